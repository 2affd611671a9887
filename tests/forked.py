"""Commands in processes of their own, without the seconds that importing takes: forks of a server that has the package loaded."""
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['spherical_lfm.tools.cli', 'forked'])
os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get('PYTHONPATH')])])  # or the server finds no module of the tests


def _work(command: str, args: list, env: dict, cwd: str | None, largest: int | None, out: str, err: str):
    "What the fork does: standard streams into files, then the command as a console script would run it."
    for stream, path in ((1, out), (2, err)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    if cwd: os.chdir(cwd)
    if largest: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = [command, *args]
    import torch

    from spherical_lfm.tools import cli
    torch.set_num_threads(1)
    getattr(cli, command)()


class Command:
    "A command that is running: `pid`, `wait()`. Writing a file of more than `largest` bytes fails as on a full disk."
    def __init__(self, command: str, *args, cwd=None, largest: int | None = None, **env):
        self.args = [command, *map(str, args)]
        self._files = tempfile.TemporaryDirectory()
        self._out, self._err = (str(Path(self._files.name)/n) for n in ('out', 'err'))
        self.process = SERVER.Process(target=_work, args=(command, self.args[1:], env, cwd and str(cwd), largest, self._out, self._err))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        "Exit code and what was printed."
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        read = lambda path: Path(path).read_text() if Path(path).exists() else ''
        return subprocess.CompletedProcess(self.args, self.process.exitcode, read(self._out), read(self._err))


def call(command: str, *args, **options) -> subprocess.CompletedProcess:
    "Run a command to its end. What the package reads while it is imported cannot be set by the environment here."
    return Command(command, *args, **options).wait()
