"""Everything that wants a GPU, part by part: agreement of CPU and CUDA, benchmarks, the four arms on digits, the studies on photographs.

    python scripts/gpu_run.py                  on a CUDA machine; writes data/results/gpu_*.json
    python scripts/gpu_run.py --parts warm agree bench    some parts, in this order
    python scripts/gpu_run.py --parts cifar --material DIR --decoders DIR    the matched experiment (see study_cifar.py)
    python scripts/gpu_run.py --parts taef2 --material DIR   the study of a real tokenizer (see study_taef2.py), into data/results/gpu
    python scripts/gpu_run.py --rehearse --out DIR   a tiny version of the same on any machine

A part that fails leaves its traceback, and the next one begins. Part `warm` compiles, in processes side by side, what the
benchmarks time later, and goes through a comparison meanwhile: a GPU that is lent by the minute should not wait for a compiler.
"""
import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from spherical_lfm.engine.files import claim_file, write_json
from spherical_lfm.engine.report import environment
from spherical_lfm.experiments import PRESETS, compare
from spherical_lfm.paths import ARMS
from spherical_lfm.sampling import Sampler
from spherical_lfm.tools.cli import slfm_bench

ROOT = Path(__file__).resolve().parent.parent


def store(args, name: str, result: dict):
    "A result with what it was made by. Refuses somebody else's file."
    made_by = environment()
    write_json(claim_file(args.out/name), {'environment': made_by | {'commit': made_by['commit'] or args.commit}} | result)


def slfm(command: str, *words) -> list[str]:
    "One of the package's commands, whether it is installed or not."
    return [sys.executable, '-c', f'import sys; from spherical_lfm.tools.cli import {command} as f; sys.argv[0] = "{command}"; f()', *map(str, words)]


def benchmarks(args) -> dict:
    "Name of the result -> words of slfm_bench."
    tiny = args.rehearse
    shape = ['--side', 8 if tiny else 32, '--precision', 'float32' if tiny else 'bf16']
    def model(name): return ['--model', 'SiT-Ti/4' if tiny else name, '--batch_size']
    return {
        'train_b2': ['train', *model('SiT-B/2'), 2 if tiny else 128, *shape, '--plain', '--rounds', 1 if tiny else 10],
        'train_xl2': ['train', *model('SiT-XL/2'), 2 if tiny else 32, *shape, '--plain', '--no_linear', '--no_eager', '--rounds', 1 if tiny else 10],
        'sample': ['sample', *model('SiT-B/2'), 2 if tiny else 128, *shape, '--steps', 2 if tiny else 12, '--rounds', 1 if tiny else 5],
        'loader': ['loader', *model('SiT-S/2'), 4 if tiny else 256, *shape, '--steps', 2 if tiny else 100],
        'paths': ['paths', '--rounds', 1 if tiny else 100],
        'fidelity': ['fidelity', '--rounds', 1 if tiny else 5, '--count', 64 if tiny else 1024],
    }


def _surroundings(**more: str) -> dict:
    "The environment of a process: this tree first, and few threads, since several of them share the cores."
    return {'OMP_NUM_THREADS': '2'} | os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])} | more


def _python(words: list, log: Path, wait: bool = True):
    "Run a program with its output in a file; `wait` raises if it fails."
    with open(log, 'w') as f: job = subprocess.Popen(words, stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, env=_surroundings())
    if wait and job.wait(): raise RuntimeError(f'{words[-3:]} failed: {log.read_text()[-3000:]}')
    return job


def warm(args):
    "Compile what the benchmarks will time, and the four arms on digits, side by side."
    with tempfile.TemporaryDirectory() as tmp:
        found = benchmarks(args)
        plans = {name: [w for w in words if w != '--plain'] for name, words in found.items() if name.startswith('train')}
        jobs = {name: _python(slfm('slfm_bench', *words[:words.index('--rounds')], '--rounds', 1), Path(tmp)/name, False) for name, words in plans.items()}
        again = [sys.executable, __file__, '--out', str(args.out), '--runs', str(args.runs), '--commit', args.commit, *['--rehearse']*args.rehearse, '--parts']
        jobs['digits'] = _python([*again, 'digits'], Path(tmp)/'digits', False)
        jobs['agree'] = _python([*again, 'agree'], Path(tmp)/'agree', False)
        failed = {name: (Path(tmp)/name).read_text()[-2000:] for name, job in jobs.items() if job.wait()}
    if failed: raise RuntimeError('\n'.join(f'{name}: {text}' for name, text in failed.items()))


def agree(args):
    "The tests that compare a GPU with a CPU; the one that fills the memory of the GPU comes in part `full`."
    some = ' and (geometry or paths)'*args.rehearse
    tests(args, 'gpu_tests.json', f'not memory_that_runs_out{some}', *(['-n', str(os.cpu_count()//2)] if importlib.util.find_spec('xdist') else []))


def full(args):
    "What happens when the memory of a GPU runs out."
    tests(args, 'gpu_tests_memory.json', 'memory_that_runs_out')


def tests(args, name: str, which: str, *more):
    "Run tests/test_cuda.py and store what came out."
    there = _surroundings(OMP_NUM_THREADS='1', **{'SLFM_TEST_DEVICE': 'cpu'} if args.rehearse else {})
    command = [sys.executable, '-m', 'pytest', '-o', 'addopts=', '-v', '--tb=short', *more, '-k', which, 'tests/test_cuda.py']
    log = args.runs/name.replace('.json', '.log')
    with open(log, 'w') as f: done = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, env=there)
    said = log.read_text()
    counts = {k: int(n) for n, k in re.findall(r'(\d+) (passed|failed|skipped|deselected|error)', said[-300:])}
    store(args, name, {'counts': counts, 'failed': re.findall(r'^FAILED \S*::(.*)$', said, re.M)})
    if done.returncode: raise RuntimeError(said[-6000:])


def bench(args):
    "Speed against the measured matmul peak and a plain step: SiT-B/2 and SiT-XL/2 at 256 tokens in bf16; sampling, loading, scoring."
    for name, words in benchmarks(args).items():
        if name.partition('_')[0] not in args.bench: continue
        slfm_bench([*map(str, words), '--out', str(claim_file(args.out/f'gpu_{name}.json'))])
        if torch.cuda.is_available(): torch.cuda.empty_cache()


def digits(args):
    "The four arms on digits."
    preset = PRESETS['digits']
    if args.rehearse: preset = replace(preset, train=preset.train | dict(steps=4, checkpoint_every=4, log_every=2), samples=32, curve_samples=16, sampler=Sampler(2))
    with tempfile.TemporaryDirectory() as tmp:
        report = compare(preset, tuple(ARMS), tmp, progress=False)
    store(args, 'gpu_digits.json', {k: report[k] for k in ('arms', 'geometry', 'preset', 'reached')})


def study(args, script: str, *more):
    "A study of its own, on whatever material is given."
    if args.material is None: sys.exit(f'{script} needs --material')
    args.out.joinpath('gpu').mkdir(parents=True, exist_ok=True)
    _python([sys.executable, str(ROOT/'scripts'/script), '--material', str(args.material), '--runs', str(args.runs/Path(script).stem), '--out', str(args.out/'gpu'), *more], args.runs/f'{script}.log')


def taef2(args): study(args, 'study_taef2.py', '--scale', '0.02' if args.rehearse else '1')


def cifar(args):
    "The matched experiment on CIFAR-10."
    small = ['--preset', 'cifar10-taef2-small', '--scale', '0.004', '--seeds', '1'] if args.rehearse else []
    study(args, 'study_cifar.py', '--decoders', str(args.decoders), *small, *args.cifar)


PARTS = {f.__name__: f for f in (warm, agree, full, bench, digits, taef2, cifar)}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT/'data'/'results', help='folder for the results')
    parser.add_argument('--rehearse', action='store_true', help='a tiny version on any machine')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=['agree', 'full', 'bench', 'digits'], help='which parts, in this order; each writes its result before the next begins')
    parser.add_argument('--material', type=Path, help='folder with TAEF2 weights and photographs')
    parser.add_argument('--decoders', type=Path, default=Path('runs/cifar-taef2'), help='what slfm_finetune left, for part cifar')
    parser.add_argument('--runs', type=Path, default=Path('runs/gpu'), help='folder for the runs of a study, and for logs')
    parser.add_argument('--cifar', nargs='*', default=[], metavar='OPTION=VALUE', help='further options of study_cifar.py, without the dashes')
    parser.add_argument('--bench', nargs='+', default=['train', 'sample', 'loader', 'paths', 'fidelity'], help='which benchmarks')
    parser.add_argument('--commit', default='', help='the commit of an exported tree, where no git can tell it')
    args = parser.parse_args()
    args.cifar = [w for o in args.cifar for w in (f'--{o.partition("=")[0]}', *o.partition('=')[2].split(','))  if w]
    if not (args.rehearse or torch.cuda.is_available()): sys.exit('no CUDA device: use --rehearse for a tiny run without one')
    for folder in (args.out, args.runs): folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in args.parts:
        try:
            PARTS[part](args)
        except Exception:
            traceback.print_exc()
            failed.append(part)
    if failed: sys.exit(f'failed: {", ".join(failed)}')
