"""Several processes as launchers start them: one that fails alone, signals to the launcher, settings of its environment."""
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from forked import SERVER, Command, call
from safetensors.torch import load_file

from spherical_lfm.decoder import DecoderTrainer, FinetuneConfig
from spherical_lfm.engine import processes as engine
from spherical_lfm.engine import runs
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import Encoding, LatentDataset, WindowOrder, encode_latents
from spherical_lfm.engine.processes import fail_together, gathered, peers_alive, processes
from spherical_lfm.engine.runs import checkpoints
from spherical_lfm.sampling import load_run
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.training import TrainConfig, Trainer

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[1]
SMALL = ['--model', 'SiT-Ti/2', '--batch_size', '16', '--log_every', '1', '--ema_decay', '0.9', '--lr', '0.002']
PATH = os.pathsep.join([str(BIN), os.environ.get('PATH', '')])
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PATH': PATH, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
#: What a default of `accelerate config` for another project may leave in the environment.
FOREIGN = {'ACCELERATE_MIXED_PRECISION': 'bf16', 'ACCELERATE_DYNAMO_BACKEND': 'inductor', 'ACCELERATE_USE_FSDP': 'true', 'FSDP_VERSION': '2',
           'ACCELERATE_GRADIENT_ACCUMULATION_STEPS': '4'}
CONFIG = dict(model='SiT-Ti/2', batch_size=16, log_every=1, ema_decay=.9, lr=2e-3)
linux = pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has ended')


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache')/'latents'
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder, Encoding(flip=False), progress=False)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def free(port: int) -> bool:
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) != 0


def ranks() -> list[dict]:
    "What a launcher tells two processes of one machine."
    port = free_port()
    return [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)) for r in (0, 1)]


def same_weights(a: Path, b: Path) -> bool:
    x, y = (load_run(f)[0].state_dict() for f in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def lines(run: Path) -> int: return (run/'log.jsonl').read_text().count('\n') if (run/'log.jsonl').exists() else 0


def until(done, seconds: float = 300.):
    "Wait for something to become true."
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline: time.sleep(.1)
    assert done()


# One process that fails alone. Nobody ends the others here, as a launcher would.
def test_a_disk_that_is_full_for_one_process_ends_both(latents, tmp_path):
    began = [Command('slfm_train', latents, tmp_path/'run', '--steps', 3, *SMALL, largest=largest, **env) for env, largest in zip(ranks(), (2_000_000, None))]
    for result in [c.wait(100) for c in began]:
        assert result.returncode == 1 and 'Traceback' not in result.stderr, result.stderr
        assert result.stderr.count('cannot write') == 1 and 'step-00000003' in result.stderr and 'what was there before is untouched' in result.stderr
    assert not checkpoints(tmp_path/'run') and not list((tmp_path/'run').rglob('.slfm-tmp-*'))


def with_nan(latents: Path, out: Path, image: int) -> Path:
    "A copy of a cache in which one latent is NaN."
    shutil.copytree(latents, out)
    shard = json.loads((out/'index.json').read_text())['shards'][0]
    data = bytearray((out/shard['file']).read_bytes())
    begin = 8 + int.from_bytes(data[:8], 'little')
    first, end = json.loads(data[8:begin])['z']['data_offsets']
    width = (end - first)//shard['count']
    data[begin + first + image*width:begin + first + (image + 1)*width] = b'\xff'*width # a NaN in every format
    (out/shard['file']).write_bytes(data)
    return out


#: Bytes of a file after which the disk of the first process is full: for run.json, a line of the log, a checkpoint of a decoder.
LARGEST = {'begin': 600, 'log': 4_000, 'decoder': 50_000}


def _fails_alone(env: dict, latents: Path, out: Path, fault: str):
    "What one of two processes does: train, meet a fault or see the other meet it, and note what `fit` raises."
    os.environ.update(env)
    torch.set_num_threads(1)
    rank = int(env['RANK'])
    try:
        if fault in LARGEST and rank == 0: resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST[fault],)*2)
        if fault == 'decoder':
            trainer = DecoderTrainer(load_tokenizer('digits'), digits_images('train')[0], FinetuneConfig(steps=2, batch_size=4, perceptual='none'), out)
        else:
            trainer = Trainer(TrainConfig(steps=100, **CONFIG), LatentDataset(latents, project=project, resident=False), out)
        if fault == 'memory' and rank == 1: trainer.loss_fn = lambda *_: torch.empty(2**55) # a real failure of the allocator
        trainer.fit(progress=False)
    except Exception as e: Path(f'{out}-{rank}').write_text(f'{type(e).__name__}: {e}')


def both(target, *args):
    "Let two processes do something, which must end in time."
    began = [SERVER.Process(target=target, args=(env, *args)) for env in ranks()]
    for p in began: p.start()
    for p in began: p.join(100)
    left = [p.kill() for p in began if p.is_alive()]
    assert not left


@pytest.mark.parametrize('fault,own,other', [
    ('begin', 'OSError: .*cannot write .*run.json', 'OSError: .*cannot write .*run.json'),
    ('log', 'OSError: .*File too large', 'OSError: .*File too large'),
    ('decoder', 'OSError: .*cannot write .*step-00000002', 'OSError: .*cannot write .*step-00000002'),
    ('nan', 'ConnectionError: another process of this job failed', 'ValueError: latents .* contain NaN or Inf'),
    ('memory', 'ConnectionError: another process of this job failed', 'OutOfMemoryError: out of memory at step 0: raise accumulate')])
def test_what_fails_for_one_process_ends_both(latents, tmp_path, fault, own, other):
    if fault == 'nan': latents = with_nan(latents, tmp_path/'latents', int(WindowOrder(1438, 16, 0).indices(2)[12])) # of the second half of a batch
    both(_fails_alone, latents, tmp_path/'run', fault)
    for rank, words in enumerate((own, other)): assert re.match(words, (tmp_path/f'run-{rank}').read_text()), rank
    assert not checkpoints(tmp_path/'run')


def _meets(env: dict, out: Path):
    "Failures of one process, of both, of none; one that cannot be sent."
    os.environ.update(env)
    rank, told = int(env['RANK']), []

    class Local(Exception): pass
    for errors in ([None, ValueError('of 1')], [OSError('of 0'), ValueError('of 1')], [None, None], [Local('of 0'), None]):
        processes()
        try:
            with fail_together():
                if errors[rank]: raise errors[rank]
            told.append('')
        except Exception as e: told.append(f'{type(e).__name__}: {e}')
    (out/str(rank)).write_text(json.dumps(told))


def test_processes_raise_what_one_of_them_raised(tmp_path):
    both(_meets, tmp_path)
    assert json.loads((tmp_path/'0').read_text()) == ['ValueError: of 1', 'OSError: of 0', '', 'Local: of 0']
    assert json.loads((tmp_path/'1').read_text()) == ['ValueError: of 1', 'ValueError: of 1', '', 'RuntimeError: Local: of 0']


def _waits(env: dict, out: Path):
    "One process says nothing until the other has given up."
    os.environ.update(env)
    engine.PATIENCE = timedelta(seconds=6)
    try:
        with peers_alive():
            if processes().process_index == 1: until((out/'0').exists, 60)
            gathered('here')
    except ConnectionError as e: (out/env['RANK']).write_text(str(e))


def test_a_process_that_says_nothing_is_not_waited_for_without_end(tmp_path):
    assert engine.PATIENCE == timedelta(minutes=30) # ten on NCCL if nothing is said
    both(_waits, tmp_path)
    for rank in '01': assert 'another process of this job failed or was stopped' in (tmp_path/rank).read_text()


# What an environment says to accelerate.
def _finetunes(out: Path, env: dict):
    os.environ.update(env)
    torch.set_num_threads(1)
    DecoderTrainer(load_tokenizer('digits'), digits_images('train')[0], FinetuneConfig(steps=3, batch_size=4, perceptual='none', lr=1e-3), out).fit(progress=False)


def _trained(latents: Path, out: Path, **env) -> list[dict]:
    "Weights of a network and of a decoder after three steps in such an environment."
    result = call('slfm_train', latents, out/'run', '--steps', 3, *SMALL, **env)
    assert result.returncode == 0, result.stderr
    process = SERVER.Process(target=_finetunes, args=(out/'decoder', env))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    return [load_run(out/'run')[0].state_dict(), load_file(checkpoints(out/'decoder')[0]/'decoder.safetensors')]


@pytest.fixture(scope='module')
def trained(latents, tmp_path_factory): return _trained(latents, tmp_path_factory.mktemp('plain'))


@pytest.mark.parametrize('names', [['ACCELERATE_MIXED_PRECISION'], ['ACCELERATE_GRADIENT_ACCUMULATION_STEPS'], list(FOREIGN)])
def test_settings_for_accelerate_change_no_run(latents, trained, tmp_path, names):
    for a, b in zip(trained, _trained(latents, tmp_path, **{k: FOREIGN[k] for k in names})):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Launchers.
@pytest.fixture
def start():
    "Start a command whose processes end with the test, whatever becomes of it."
    began = []

    def start(*args, **env) -> subprocess.Popen:
        began.append(subprocess.Popen([*map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV | env))
        return began[-1]
    yield start
    for p in began:
        if p.poll() is None: [c.kill() for c in (*psutil.Process(p.pid).children(recursive=True), p)]


@linux
def test_signals_to_torchrun_save_and_leave_nobody_behind(latents, tmp_path, start):
    "SIGTERM is passed on to the processes. SIGUSR1 is not known to it: it ends, and so do they."
    runs = {signal.SIGTERM: tmp_path/'term', signal.SIGUSR1: tmp_path/'usr1'}
    began = {s: start(BIN/'torchrun', '--standalone', '--nproc_per_node', 2, '--no-python', BIN/'slfm_train', latents, run, '--steps', 100_000, *SMALL) for s, run in runs.items()}
    for run in runs.values(): until(lambda run=run: lines(run) > 3)
    workers = {s: psutil.Process(p.pid).children(recursive=True) for s, p in began.items()}
    assert {s: len(w) for s, w in workers.items()} == {s: 2 for s in runs}
    for s, p in began.items(): p.send_signal(s)
    _, left = psutil.wait_procs(sum(workers.values(), []), timeout=60)
    for p in left: p.kill()
    assert not left
    out = {s: p.communicate(timeout=60)[0] for s, p in began.items()}
    for s, run in runs.items():
        assert len(checkpoints(run)) == 1 and 'stopped by a signal and saved' in out[s], out[s]
        assert json.loads((checkpoints(run)[0]/'state.json').read_text())['step'] == lines(run)


def _told_in_step_two(env: dict, latents: Path, out: Path, seconds: float):
    "One of two processes. By the clock of the first a step takes so many seconds, by that of the second hardly any; the second hears of a signal."
    os.environ.update(env)
    torch.set_num_threads(1)
    rank = int(env['RANK'])
    trainer = Trainer(TrainConfig(steps=20, **CONFIG), LatentDataset(latents, project=project), out)
    runs.time = SimpleNamespace(perf_counter=lambda: (1e-6 if rank else seconds)*trainer.step)
    train = trainer.train_step
    def step():
        if rank and trainer.step == 2: trainer._stop_soon()
        return train()
    trainer.train_step = step
    Path(f'{out}-{rank}').write_text(str(trainer.fit(progress=False)['step']))


@pytest.mark.parametrize('seconds, stop', [(30., 3), (1., 4), (.4, 5), (.01, 10)])
def test_a_signal_is_heard_within_two_seconds_or_a_step(latents, tmp_path, seconds, stop):
    "Launchers kill 30 seconds after they have passed it on, which ten slow steps take longer than."
    both(_told_in_step_two, latents, tmp_path/'run', seconds)
    assert [(tmp_path/f'run-{r}').read_text() for r in (0, 1)] == [str(stop)]*2
    assert checkpoints(tmp_path/'run')[-1].name == f'step-{stop:08d}'


SRUN = """#!/usr/bin/env bash
kill_all=
while [[ $1 == --* ]]; do [[ $1 == --kill-on-bad-exit=1 ]] && kill_all=1; shift; done
pids=()
for rank in 0 1; do
    start=("$@"); [[ $rank == "${FAILS:-}" ]] && start=(false)
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "${start[@]}" & pids+=($!)
done
code=0
for _ in 0 1; do
    wait -n && continue
    code=1
    [[ $kill_all ]] && kill -9 "${pids[@]}" 2> /dev/null
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '127.0.0.1\\nelsewhere\\n'; else echo "$@" >> "$CALLS"; fi
"""


@pytest.fixture
def sbatch(tmp_path, start):
    "configs/slurm.sh on a cluster of one machine: `srun` starts two tasks, `scontrol` notes what it is asked."
    (tmp_path/'bin').mkdir()
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (tmp_path/'bin'/name).write_text(text)
        (tmp_path/'bin'/name).chmod(0o755)
    number = next(n for n in range(os.getpid(), os.getpid() + 20_000) if free(10_000 + n % 20_000)) # its port follows from it
    job = dict(SLURM_JOB_ID=str(number), SLURM_JOB_NODELIST='both', SLURM_CPUS_PER_TASK='1', CALLS=str(tmp_path/'calls'), PATH=os.pathsep.join([str(tmp_path/'bin'), PATH]))
    return lambda *args, **env: start('bash', ROOT/'configs'/'slurm.sh', *args, **job | env)


def tasks(job: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(job.pid).children(recursive=True) if p.name().startswith(('python', 'slfm_train'))]


@linux
def test_a_slurm_job_trains_saves_and_queues_itself_again(latents, tmp_path, sbatch):
    job = sbatch(latents, tmp_path/'run', '--steps', 100_000, *SMALL)
    until(lambda: lines(tmp_path/'run') > 3)
    found = tasks(job)
    assert len(found) == 2
    for p in found: p.send_signal(signal.SIGUSR1) # as Slurm signals the tasks of a step
    out = job.communicate(timeout=100)[0]
    assert job.returncode == 0 and out.count('stopped by a signal and saved') == 1, out # by the first of two: they are one job
    assert len(checkpoints(tmp_path/'run')) == 1 and (tmp_path/'calls').read_text().startswith('requeue ')


def test_a_slurm_job_ends_where_a_task_fails(latents, tmp_path, sbatch):
    "Before the processes have met: the other one would wait for half an hour."
    job = sbatch(latents, tmp_path/'run', '--steps', 3, *SMALL, FAILS='1')
    out = job.communicate(timeout=30)[0]
    assert job.returncode == 1 and not (tmp_path/'calls').exists(), out


def test_two_machines_train_as_one_does(latents, tmp_path, start):
    "Two agents that meet at a port, each with one process, against two processes on one machine."
    pair = [Command('slfm_train', latents, tmp_path/'one', '--steps', 3, *SMALL, **env) for env in ranks()]
    meet = ['--nnodes', 2, '--nproc_per_node', 1, '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'127.0.0.1:{free_port()}', '--rdzv_id', 'slfm', '--local_addr', '127.0.0.1']
    began = [start(BIN/'torchrun', *meet, '--no-python', BIN/'slfm_train', latents, tmp_path/'two', '--steps', 3, *SMALL) for _ in range(2)]
    out = [p.communicate(timeout=300)[0] for p in began]
    assert [p.returncode for p in began] == [0, 0], out
    assert sum('done at step 3' in o for o in out) == 1
    assert [c.wait(100).returncode for c in pair] == [0, 0]
    assert same_weights(tmp_path/'one', tmp_path/'two')
