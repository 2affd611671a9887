"""Everything that wants a GPU, in one call: agreement of CPU and CUDA, path benchmark, the four arms on digits.

    python scripts/gpu_run.py               on a CUDA machine; writes data/results/gpu_*.json
    python scripts/gpu_run.py --material DIR   the study of a real tokenizer as well (see study_taef2.py), into data/results/gpu
    python scripts/gpu_run.py --rehearse --out DIR   a tiny version of the same on any machine
"""
import argparse
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from spherical_lfm.cli import slfm_bench
from spherical_lfm.experiments import PRESETS, Preset, compare
from spherical_lfm.paths import ARMS
from spherical_lfm.tokenizers import write_json

ROOT = Path(__file__).resolve().parent.parent


def main(out: Path, rehearse: bool, material: Path | None):
    "Run the parts; each writes its result before the next begins."
    if not (rehearse or torch.cuda.is_available()): sys.exit('no CUDA device: use --rehearse for a tiny run without one')
    tests = subprocess.run([sys.executable, '-m', 'pytest', '-o', 'addopts=', str(ROOT/'tests'/'test_sphere.py'), '-k', 'cuda'], capture_output=True, text=True)
    write_json(out/'gpu_sphere.json', {'returncode': tests.returncode, 'closing_line': tests.stdout.strip().splitlines()[-1]})
    slfm_bench(['paths', '--rounds', '3' if rehearse else '100', '--out', str(out/'gpu_paths.json')])
    preset = PRESETS['digits']
    if rehearse: preset = Preset(**asdict(preset) | dict(train=preset.train | dict(steps=4, checkpoint_every=4, log_every=2), samples=32, curve_samples=16, sample_steps=2))
    with tempfile.TemporaryDirectory() as tmp: write_json(out/'gpu_digits.json', compare(preset, tuple(ARMS), tmp))
    if material:
        with tempfile.TemporaryDirectory() as tmp:
            subprocess.run([sys.executable, str(ROOT/'scripts'/'study_taef2.py'), '--material', str(material), '--runs', tmp, '--out', str(out/'gpu'), '--scale', '0.02' if rehearse else '1'], check=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT/'data'/'results', help='folder for the results')
    parser.add_argument('--rehearse', action='store_true', help='a tiny version on any machine')
    parser.add_argument('--material', type=Path, help='folder with TAEF2 weights and photographs')
    args = parser.parse_args()
    main(args.out, args.rehearse, args.material)
