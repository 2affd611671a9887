"""Bad input: one sentence that names the thing and the remedy, exit code 1, nothing written. A bug keeps its traceback."""
import argparse
import functools
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from spherical_lfm import cli
from spherical_lfm.decoder import FinetuneConfig
from spherical_lfm.fidelity import extract_features, feature_function, load_reference, npz_batches, score_features, source_batches, to_uint8
from spherical_lfm.latents import ImageSource, LatentDataset, encode_latents
from spherical_lfm.paths import SlerpPath, shift_time
from spherical_lfm.sampling import FlowScheduler, SphericalSiTPipeline, load_run, sample
from spherical_lfm.sit import SiT
from spherical_lfm.tokenizers import AutoencoderTAEF2, digits_images, load_tokenizer, open_tensors, read_json, write_json
from spherical_lfm.training import TrainConfig

#: Words that say what to do.
REMEDY = re.compile(r'\b(give|choose|use|make|must|remove|raise|set|lower|take|connect|save|fetch|encode|see|add|store|wanted|need|needs|knows|install|look|accept|at least|divisible|untouched|only|too few|compare)\b')


def tree(folder: Path) -> dict:
    "Everything below a folder: size and time of change of files, the names of folders."
    return {str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns) if f.is_file() else None for f in sorted(folder.rglob('*'))}


def references(folder: Path):
    "Files of statistics with something wrong in each."
    mu, sigma = np.zeros(64), np.eye(64)
    lopsided, nan = sigma.copy(), mu.copy()
    lopsided[0, 1], nan[3] = 1, np.nan
    kinds = {'short-sigma': dict(mu=mu, sigma=sigma[:-1, :-1], count=100), 'nan': dict(mu=nan, sigma=sigma, count=100), 'inf': dict(mu=mu, sigma=sigma*np.inf, count=100),
             'lopsided': dict(mu=mu, sigma=lopsided, count=100), 'negative': dict(mu=mu, sigma=-sigma, count=100), 'few': dict(mu=mu, sigma=sigma, count=3), 'odd-count': dict(mu=mu, sigma=sigma, count=[3, 4]),
             'words': dict(mu=np.array(['a']*64), sigma=sigma, count=100), 'wide': dict(mu=np.zeros(8), sigma=np.eye(8), count=100), 'half': dict(mu=mu), 'grey': dict(arr_0=np.zeros((20, 16, 16), np.uint8)),
             'large': dict(arr_0=np.zeros((20, 32, 32, 3), np.uint8)), 'spatial': dict(mu=mu, sigma=sigma, mu_s=nan, sigma_s=sigma, count=100)}
    for name, arrays in kinds.items(): np.savez(folder/f'{name}.npz', **arrays)
    np.save(folder/'array', mu)
    (folder/'array.npy').rename(folder/'array.npz')
    (folder/'noise.npz').write_bytes(b'no zip')
    (folder/'cut.npz').write_bytes((folder/'large.npz').read_bytes()[:-200])
    (folder/'folder.npz').mkdir()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder as people have them: latents, a run, broken files, files in place of folders."
    folder = tmp_path_factory.mktemp('inputs')
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder/'latents', flip=False, progress=False)
    cli.slfm_train([str(folder/'latents'), str(folder/'run'), '--preset', 'digits', '--steps', '2', '--log_every', '1'])
    (folder/'file').write_text('a file')
    (folder/'cut.json').write_text('{"config":')
    (folder/'list.json').write_text('[1, 2]')
    (folder/'foreign.json').write_text('{"name": "other"}')
    for name in ('foreign', 'cut', 'no-shard', 'run2'): (folder/name).mkdir()
    (folder/'foreign'/'index.json').write_text('{"metadata": {}, "weight_map": {}}')
    (folder/'cut'/'index.json').write_text('{"shards": [')
    (folder/'no-shard'/'index.json').write_text((folder/'latents'/'index.json').read_text())
    (folder/'run2'/'checkpoints'/'step-00000007').mkdir(parents=True)
    (folder/'parquet').mkdir()
    (folder/'broken.parquet').write_text('no table')
    for name in ('empty', 'lone', 'broken'): (folder/name/'class').mkdir(parents=True)
    Image.new('RGB', (20, 20), 'red').save(folder/'lone'/'class'/'x.png')
    (folder/'broken'/'class'/'x.png').write_text('no')
    for name, config in (('cut-vae', '{"_class_name": '), ('other-vae', '{"_class_name": "UNet2DModel"}'), ('bare-vae', '{"_class_name": "AutoencoderKL"}')):
        (folder/name).mkdir()
        (folder/name/'config.json').write_text(config)
    load_tokenizer('digits').save_pretrained(folder/'cut-record')
    (folder/'cut-record'/'tokenizer.json').write_text('{"transform"')
    references(folder)
    torch.save({'model': torch.nn.Linear(1, 1)}, folder/'object.pt')
    (folder/'noise.pt').write_bytes(b'noise')
    torch.save([torch.zeros(1)], folder/'list.pt')
    return folder


TRAIN, SAMPLE, SCORE = ['slfm_train', 'latents'], ['slfm_sample', 'run'], ['slfm_evaluate', 'digits']
DIGITS = ['--extractor', 'digits', '--size', '16']
COMMANDS = [
    # counts and other numbers
    *[([*line, f'--{name}', value], f'{name} must be {allowed}') for line, name, value, allowed in [
        (['slfm_encode', 'digits', 'digits', 'new'], 'size', '0', 'at least 1'), (['slfm_encode', 'digits', 'digits', 'new'], 'batch_size', '-4', 'at least 1'),
        (['slfm_encode', 'digits', 'digits', 'new'], 'shard_size', '0', 'at least 1'), (['slfm_encode', 'digits', 'digits', 'new'], 'seed', '-2', '-1 to'),
        (['slfm_analyze', 'digits', 'digits'], 'size', '-16', 'at least 1'), (['slfm_analyze', 'digits', 'digits'], 'count', '0', 'at least 1'), (['slfm_analyze', 'digits', 'digits'], 'pack', '0', 'at least 1'),
        (['slfm_probe', 'digits', 'digits'], 'count', '-1', 'at least 1'), (['slfm_probe', 'digits', 'digits'], 'sensitivity_count', '0', 'at least 1'), (['slfm_probe', 'digits', 'digits'], 'batch_size', '0', 'at least 1'),
        (['slfm_finetune', 'digits', 'digits', 'new'], 'steps', '0', 'at least 1'), (['slfm_finetune', 'digits', 'digits', 'new'], 'lr', 'nan', 'a finite number'),
        (['slfm_finetune', 'digits', 'digits', 'new'], 'lr', '-1', 'at least'), (['slfm_finetune', 'digits', 'digits', 'new'], 'held_out_count', '0', 'at least 1'),
        (['slfm_finetune', 'digits', 'digits', 'new'], 'discriminator_start', '-1', 'at least 0'),
        ([*TRAIN, 'new'], 'steps', '-5', 'at least 1'), ([*TRAIN, 'new'], 'batch_size', '0', 'at least 1'), ([*TRAIN, 'new'], 'lr', '0', 'at least'), ([*TRAIN, 'new'], 'lr', 'inf', 'a finite number'),
        ([*TRAIN, 'new'], 'warmup', '-1', 'at least 0'), ([*TRAIN, 'new'], 'ema_decay', '1.5', '0 to 1'), ([*TRAIN, 'new'], 'label_dropout', '-0.1', '0 to 1'), ([*TRAIN, 'new'], 'keep', '-1', 'at least 0'),
        ([*TRAIN, 'new'], 'accumulate', '0', 'at least 1'), ([*TRAIN, 'new'], 'max_grad_norm', 'nan', 'a finite number'), ([*TRAIN, 'new'], 'log_every', '0', 'at least 1'), ([*TRAIN, 'new'], 'classes', '0', 'at least 1'),
        ([*SAMPLE, 'new'], 'count', '0', 'at least 1'), ([*SAMPLE, 'new'], 'steps', '0', 'at least 1'), ([*SAMPLE, 'new'], 'label', '-3', 'at least -1'), ([*SAMPLE, 'new'], 'guidance', 'nan', 'a finite number'),
        ([*SAMPLE, 'new'], 'guidance', '-1', 'at least 0'), ([*SAMPLE, 'new'], 'tolerance', '0', 'at least'), ([*SAMPLE, 'new'], 'step', '-7', 'at least -1'), ([*SAMPLE, 'new'], 'seed', '99999999999', '-1 to'),
        ([*SCORE, 'digits'], 'size', '0', 'at least 1'), ([*SCORE, 'digits'], 'bootstrap', '-1', 'at least 2'), ([*SCORE, 'digits'], 'bootstrap', '1', 'at least 2'), (['slfm_evaluate', 'run', 'digits'], 'count', '-1', 'at least 1'),
        (['slfm_compare', 'digits'], 'steps', '-1', 'at least 1'), (['slfm_compare', 'digits'], 'samples', '-1', 'at least 1'), (['slfm_demo'], 'seed', '-9', '-1 to'),
        (['slfm_bench', 'paths'], 'rounds', '-1', 'at least 1'), (['slfm_bench', 'train'], 'side', '0', 'at least 1'), (['slfm_bench', 'sample'], 'batch_size', '-1', 'at least 1')]],
    # what argparse says
    (['slfm_train'], 'required: latents, out; see slfm_train --help'),
    (['slfm_sample', 'run', 'new', '--count', 'many'], "invalid int value: 'many'"),
    (['slfm_demo', '--colour', 'red'], 'unrecognized arguments: --colour red; see'),
    # names
    (['slfm_demo', '--arms', 'slerp'], "unknown arm 'slerp': choose one of vanilla-linear"),
    (['slfm_compare', 'nothing'], "unknown preset 'nothing': choose one of digits"),
    ([*TRAIN, 'new', '--arm', 'chord'], 'unknown arm'),
    ([*TRAIN, 'new', '--model', 'SiT-Z/9'], 'unknown model'),
    ([*TRAIN, 'new', '--precision', 'fp8'], 'precision must be one of'),
    ([*TRAIN, 'new', '--time_sampling', 'cosine'], 'time_sampling must be one of'),
    ([*TRAIN, 'new', '--time_shift', '0'], 'time shift must be positive'),
    ([*SAMPLE, 'new', '--method', 'rk9'], 'unknown method'),
    ([*SAMPLE, 'new', '--precision', 'fp8'], 'float32 or bf16'),
    ([*SAMPLE, 'new', '--label', '77'], 'class index 77 is out of range: this model knows classes 0 to 9'),
    ([*SAMPLE, 'new', '--negative', '10'], 'negative class 10 is out of range'),
    ([*SAMPLE, 'new', '--shift', '0'], 'time shift must be positive'),
    ([*SAMPLE, 'new', '--step', '9'], 'no checkpoint of step 9, only 2'),
    (['slfm_encode', 'digits', 'digits', 'new', '--dtype', 'fp8', '--size', '16'], 'float32 or bf16'),
    (['slfm_encode', 'digits', 'digits', 'new', '--precision', 'fp8', '--size', '16'], 'float32 or bf16'),
    (['slfm_analyze', 'digits', 'digits', '--precision', 'int4'], 'precision must be'),
    (['slfm_analyze', 'digits', 'digits', '--statistics', 'some'], 'statistics must be'),
    (['slfm_probe', 'digits', 'digits', '--distances', 'l2'], 'unknown distance'),
    (['slfm_probe', 'digits', 'digits', '--neighbours', 'near'], 'neighbours must be'),
    (['slfm_finetune', 'digits', 'digits', 'new', '--size', '16', '--arms', 'both'], 'arms must be among'),
    (['slfm_finetune', 'digits', 'digits', 'new', '--size', '16', '--extractor', 'vgg'], 'unknown extractor'),
    ([*SCORE, 'digits', '--extractor', 'vgg'], 'unknown extractor'),
    (['slfm_evaluate', 'run', 'digits', *DIGITS, '--save', 'gif'], "save must be 'none', 'png' or 'npz'"),
    (['slfm_evaluate', 'run', 'digits', *DIGITS, '--method', 'rk9'], 'unknown method'),
    (['slfm_bench', 'everything'], 'unknown benchmark'),
    (['slfm_bench', 'train', '--precision', 'fp8'], 'float32 or bf16'),
    (['slfm_bench', 'sample', '--model', 'SiT-Z/9'], 'unknown model'),
    # guidance that would do nothing
    ([*SAMPLE, 'new', '--guidance', '2', '--guide_from', '.9', '--guide_to', '.1'], 'guidance from 0.9 to 0.1 is an empty interval'),
    ([*SAMPLE, 'new', '--guide_from', '.5', '--guide_to', '.5'], 'empty interval'),
    ([*SAMPLE, 'new', '--guide_from', '1.5', '--guide_to', '2'], 'empty interval'),
    ([*SAMPLE, 'new', '--guidance', '2', '--steps', '4', '--guide_from', '.3', '--guide_to', '.4'], 'none of the 4 steps begins between 0.3 and 0.4'),
    # files in place of folders, folders in place of files, files of other kinds
    (['slfm_train', 'nothing', 'new'], 'make them with slfm_encode'),
    (['slfm_train', 'file', 'new'], 'make them with slfm_encode'),
    (['slfm_train', 'cut', 'new'], 'index.json is no .*make them with slfm_encode'),
    (['slfm_train', 'foreign', 'new'], 'it holds no tokenizer; make them with slfm_encode'),
    (['slfm_train', 'no-shard', 'new'], 'is missing: encode again'),
    ([*TRAIN, 'new', '--preset', 'digits', '--resume', 'file'], 'file is no checkpoint'),
    ([*TRAIN, 'run', '--preset', 'digits', '--resume', 'never'], 'resume is never'),
    ([*TRAIN, 'run', '--preset', 'digits', '--lr', '0.5'], 'changed settings'),
    ([*TRAIN, 'new', '--preset', 'digits', '--accumulate', '7'], 'cannot be divided among 1 processes in 7 parts'),
    ([*TRAIN, 'new', '--preset', 'digits', '--classes', '5'], 'labels go from 0 up to 9, but classes are 0 to 4'),
    (['slfm_sample', 'file', 'new'], 'no checkpoint in file'),
    (['slfm_sample', 'nowhere', 'new'], 'no checkpoint in nowhere'),
    (['slfm_sample', 'run2', 'new'], 'all checkpoints in run2 are damaged: remove them'),
    ([*SAMPLE, 'new', '--tokenizer', 'nothing'], 'neither a known tokenizer'),
    (['slfm_encode', 'no-tokenizer', 'digits', 'new'], 'neither a known tokenizer'),
    (['slfm_encode', 'cut-vae', 'digits', 'new'], 'config.json is no config of an autoencoder'),
    (['slfm_encode', 'other-vae', 'digits', 'new'], "names 'UNet2DModel', which is not a diffusers autoencoder"),
    (['slfm_encode', 'bare-vae', 'digits', 'new'], 'no autoencoder at bare-vae'),
    (['slfm_encode', 'cut-record', 'digits', 'new'], 'tokenizer.json is no record of a tokenizer'),
    (['slfm_encode', 'digits', 'no-images.parquet', 'new'], 'no images at'),
    (['slfm_encode', 'digits', 'broken.parquet', 'new'], 'broken.parquet is no'),
    (['slfm_encode', 'digits', 'empty', 'new'], 'holds no images'),
    (['slfm_encode', 'digits', 'lone', 'new', '--size', '18'], 'divisible by 4'),
    (['slfm_analyze', 'digits', 'empty', '--size', '16'], 'holds no images'),
    (['slfm_analyze', 'digits', 'lone', '--size', '18'], 'divisible by 4'),
    (['slfm_analyze', 'digits', 'broken', '--size', '16'], 'no readable image'),
    (['slfm_analyze', 'no-vae', 'digits'], 'neither a known tokenizer'),
    (['slfm_analyze', 'digits', 'digits', '--out', '/proc/analysis', '--size', '16', '--count', '32'], 'cannot write'),
    (['slfm_sample', 'run', '/proc/images', '--count', '2', '--steps', '1'], 'cannot write'),
    ([*TRAIN, '/proc/run', '--preset', 'digits', '--steps', '1'], 'cannot write'),
    # scoring
    *[([*SCORE, f'{name}.npz', *DIGITS], words) for name, words in [
        ('short-sigma', r'mu of short-sigma.npz has 64 values, but sigma has shape \(63, 63\)'), ('nan', 'contains NaN or Inf: make the reference again'), ('inf', 'contains NaN or Inf'), ('lopsided', 'not symmetric'),
        ('negative', 'negative variance'), ('few', 'made from 3 images, too few'), ('odd-count', 'count of odd-count.npz is no number'), ('words', 'are no numbers'), ('wide', 'statistics of 8 features, digits has 64'),
        ('half', 'neither statistics .* nor images'), ('grey', 'must be uint8'), ('large', 'takes images of 16 x 16 pixels, got 32 x 32: give size 16'), ('spatial', 'mu_s or sigma_s'), ('array', 'a single array'),
        ('noise', 'no .npz reference'), ('cut', 'no .npz reference'), ('folder', 'no .npz file at'), ('missing', 'no .npz file at')]],
    ([*SCORE, 'NAN.NPZ', *DIGITS], 'contains NaN or Inf'),
    ([*SCORE, 'digits', '--extractor', 'digits', '--size', '32'], 'no|takes images of 16 x 16'),
    (['slfm_evaluate', 'nowhere.npz', 'digits', *DIGITS], 'no .npz file at nowhere.npz'),
    (['slfm_evaluate', 'nowhere.parquet', 'digits', *DIGITS], 'no images at'),
    (['slfm_evaluate', 'empty', 'digits', *DIGITS], 'holds no images'),
    (['slfm_evaluate', 'lone', 'digits', *DIGITS], '1 samples are too few'),
    ([*SCORE, 'digits', *DIGITS, '--against', 'latents'], 'latents is no result of slfm_evaluate'),
    ([*SCORE, 'digits', *DIGITS, '--against', 'nothing.json'], 'nothing.json is missing'),
    ([*SCORE, 'digits', *DIGITS, '--against', 'cut.json'], 'cut.json is no result of slfm_evaluate'),
    ([*SCORE, 'digits', *DIGITS, '--against', 'list.json'], 'list.json is no result of slfm_evaluate'),
    ([*SCORE, 'digits', *DIGITS, '--against', 'foreign.json'], 'foreign.json is no result of slfm_evaluate'),
]


def refused(argv: list[str]) -> str:
    "The sentence with which a command ends."
    with pytest.raises(SystemExit) as e: getattr(cli, argv[0])(argv[1:])
    assert isinstance(e.value.code, str), f'ended with {e.value.code!r}'
    return e.value.code


@pytest.mark.parametrize('argv,words', COMMANDS, ids=[' '.join(argv).replace('/', '|') for argv, _ in COMMANDS])
def test_commands_refuse_with_one_sentence(place, argv, words, monkeypatch, capfd):
    monkeypatch.chdir(place)
    if 'NAN.NPZ' in argv and not (place/'NAN.NPZ').exists(): (place/'NAN.NPZ').write_bytes((place/'nan.npz').read_bytes())
    before = tree(place)
    told = refused(argv)
    assert told.startswith(f'{argv[0]}: ') and re.search(words, told), told
    assert len(told) < 330 and '\n' not in told and 'Traceback' not in told, told
    assert REMEDY.search(told), told
    assert tree(place) == before
    assert 'Traceback' not in capfd.readouterr().err
