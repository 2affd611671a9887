"""Everything that wants a GPU, part by part: agreement of CPU and CUDA, benchmarks, the four arms on digits, the studies on photographs.

    python scripts/gpu_run.py                  on a CUDA machine; writes data/results/gpu_*.json
    python scripts/gpu_run.py --parts agree bench    some parts
    python scripts/gpu_run.py --parts cifar --material DIR --decoders DIR    the matched experiment (see study_cifar.py)
    python scripts/gpu_run.py --parts taef2 --material DIR   the study of a real tokenizer (see study_taef2.py), into data/results/gpu
    python scripts/gpu_run.py --rehearse --out DIR   a tiny version of the same on any machine
"""
import argparse
import subprocess
import sys
import tempfile
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


def store(path: Path, result: dict):
    "A result with what it was made by. Refuses somebody else's file."
    write_json(claim_file(path), {'environment': environment()} | result)


def agree(args):
    "The CUDA cases of the tests."
    tests = subprocess.run([sys.executable, '-m', 'pytest', '-o', 'addopts=', str(ROOT/'tests'/'test_sphere.py'), str(ROOT/'tests'/'test_training.py'), '-k', 'cuda'], capture_output=True, text=True)
    store(args.out/'gpu_tests.json', {'returncode': tests.returncode, 'closing_line': tests.stdout.strip().splitlines()[-1]})


def bench(args):
    "Speed against the measured matmul peak: SiT-B/2 and SiT-XL/2 at 256 tokens in bf16, sampling, loading."
    few = ['--rounds', '1' if args.rehearse else '20']
    big, small = ('SiT-XL/2', 'SiT-B/2') if not args.rehearse else ('SiT-Ti/4', 'SiT-Ti/8')
    side, precision = ['--side', '32' if not args.rehearse else '8'], ['--precision', 'bf16' if not args.rehearse else 'float32']
    batch = lambda n: ['--batch_size', str(n if not args.rehearse else 2)]
    slfm_bench(['paths', *few, '--out', str(args.out/'gpu_paths.json')])
    for name, model, n in (('xl2', big, 64), ('b2', small, 256)): slfm_bench(['train', '--model', model, *side, *precision, *batch(n), *few, '--out', str(args.out/f'gpu_train_{name}.json')])
    slfm_bench(['sample', '--model', small, *side, *precision, *batch(64), *few, '--out', str(args.out/'gpu_sample.json')])
    slfm_bench(['loader', '--model', 'SiT-S/2' if not args.rehearse else 'SiT-Ti/4', '--side', '16' if not args.rehearse else '8', *precision, *batch(256), '--out', str(args.out/'gpu_loader.json')])
    slfm_bench(['fidelity', *few, '--count', '256' if not args.rehearse else '64', '--out', str(args.out/'gpu_fidelity.json')])


def digits(args):
    "The four arms on digits."
    preset = PRESETS['digits']
    if args.rehearse: preset = replace(preset, train=preset.train | dict(steps=4, checkpoint_every=4, log_every=2), samples=32, curve_samples=16, sampler=Sampler(2))
    with tempfile.TemporaryDirectory() as tmp: store(args.out/'gpu_digits.json', compare(preset, tuple(ARMS), tmp))


def study(args, script: str, *more):
    "A study of its own, on whatever material is given."
    if args.material is None: sys.exit(f'{script} needs --material')
    with tempfile.TemporaryDirectory() as tmp: subprocess.run([sys.executable, str(ROOT/'scripts'/script), '--material', str(args.material), '--runs', tmp, '--out', str(args.out/'gpu'), *more], check=True)


def taef2(args): study(args, 'study_taef2.py', '--scale', '0.02' if args.rehearse else '1')


def cifar(args):
    "The matched experiment on CIFAR-10."
    study(args, 'study_cifar.py', '--decoders', str(args.decoders), *(['--preset', 'cifar10-taef2-small', '--scale', '0.004', '--seeds', '1'] if args.rehearse else []))


PARTS = {f.__name__: f for f in (agree, bench, digits, taef2, cifar)}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT/'data'/'results', help='folder for the results')
    parser.add_argument('--rehearse', action='store_true', help='a tiny version on any machine')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=['agree', 'bench', 'digits'], help='which parts, in this order; each writes its result before the next begins')
    parser.add_argument('--material', type=Path, help='folder with TAEF2 weights and photographs')
    parser.add_argument('--decoders', type=Path, default=Path('runs/cifar-taef2'), help='what slfm_finetune left, for part cifar')
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()): sys.exit('no CUDA device: use --rehearse for a tiny run without one')
    for part in args.parts: PARTS[part](args)
