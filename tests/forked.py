"""Commands in processes of their own, without the seconds that importing takes: forks of a server that has all loaded."""
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['spherical_lfm.tools.cli', 'spherical_lfm.tools.pipeline', 'diffusers.models.autoencoders.autoencoder_kl',
                               'sklearn.datasets', 'matplotlib.pyplot', 'seaborn', 'nbdev.test', 'forked'])
os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get('PYTHONPATH')])])  # or the server finds no module of the tests
os.environ.setdefault('MPLBACKEND', 'agg')  # read when the server imports matplotlib


def _run(command: str, args: list):
    "The command as its console script would run it."
    if command == 'nbdev_test':
        from nbdev.test import nbdev_test
        return nbdev_test(path=args[0])  # it reads `sys.argv` in a script only
    from spherical_lfm.tools import cli
    sys.argv = [command, *args]
    return getattr(cli, command)()


def _work(command: str, args: list, env: dict, cwd: str | None, largest: int | None, files: Path):
    "What the fork does: standard streams into files, then the command; last the most memory it or a child of it had."
    for stream, name in ((1, 'out'), (2, 'err')): os.dup2(os.open(files/name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    if cwd: os.chdir(cwd)
    if largest: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    import torch
    torch.set_num_threads(1)
    try:
        _run(command, args)
    finally:
        most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        (files/'peak').write_text(str(most//(1024 if sys.platform == 'darwin' else 1)))


class Command:
    "A command that is running: `pid`, `wait()`. Writing a file of more than `largest` bytes fails as on a full disk."
    def __init__(self, command: str, *args, cwd=None, largest: int | None = None, **env):
        self.args = [command, *map(str, args)]
        self._place = tempfile.TemporaryDirectory()
        self.files = Path(self._place.name)
        self.process = SERVER.Process(target=_work, args=(command, self.args[1:], env, cwd and str(cwd), largest, self.files))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        "Exit code and what was printed; `peak`, in KiB, if it was not killed."
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, err, peak = (f.read_text() if (f := self.files/name).exists() else '' for name in ('out', 'err', 'peak'))
        result = subprocess.CompletedProcess(self.args, self.process.exitcode, out, err)
        result.peak = int(peak or 0)
        return result


def call(command: str, *args, **options) -> subprocess.CompletedProcess:
    "Run a command to its end. What the package reads while it is imported cannot be set by the environment here."
    return Command(command, *args, **options).wait()
