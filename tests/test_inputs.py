"""Bad input: one sentence that names thing and remedy, exit code 1, nothing written. A bug keeps its traceback."""
import argparse
import http.server
import json
import logging
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

from spherical_lfm.decoder import FinetuneConfig
from spherical_lfm.engine.features import feature_function, lpips_distance, semantic_features
from spherical_lfm.engine.files import read_json, write_json
from spherical_lfm.engine.images import ImageSource, digits_images, to_uint8
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.engine.runs import tracker_names
from spherical_lfm.engine.weights import open_tensors
from spherical_lfm.fidelity import load_reference, npz_batches, score_features, source_batches
from spherical_lfm.paths import SlerpPath, shift_time
from spherical_lfm.sampling import Sampler, load_run, sample
from spherical_lfm.sit import SiT
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import cli
from spherical_lfm.tools.pipeline import FlowScheduler, SphericalSiTPipeline
from spherical_lfm.training import TrainConfig

#: Words that say what to do.
REMEDY = re.compile(r'\b(add|give|choose|use|make|must|remove|raise|set|lower|take|connect|save|fetch|encode|see|store|'
                    r'look|needs|knows|train|wanted|at least|divisible|untouched|only|too few)\b')


def tree(folder: Path) -> dict:
    "Everything below a folder: size and time of change of files, the names of folders."
    def state(f: Path): return (f.stat().st_size, f.stat().st_mtime_ns) if f.is_file() else None
    return {str(f.relative_to(folder)): state(f) for f in sorted(folder.rglob('*'))}


def references(folder: Path):
    "Files of statistics with something wrong in each."
    mu, sigma = np.zeros(64), np.eye(64)
    lopsided, nan = sigma.copy(), mu.copy()
    lopsided[0, 1], nan[3] = 1, np.nan
    kinds = {
        'short-sigma': dict(mu=mu, sigma=sigma[:-1, :-1], count=100),
        'nan': dict(mu=nan, sigma=sigma, count=100),
        'inf': dict(mu=mu, sigma=sigma*np.inf, count=100),
        'lopsided': dict(mu=mu, sigma=lopsided, count=100),
        'negative': dict(mu=mu, sigma=-sigma, count=100),
        'few': dict(mu=mu, sigma=sigma, count=3),
        'odd-count': dict(mu=mu, sigma=sigma, count=[3, 4]),
        'words': dict(mu=np.array(['a']*64), sigma=sigma, count=100),
        'wide': dict(mu=np.zeros(8), sigma=np.eye(8), count=100),
        'half': dict(mu=mu),
        'grey': dict(arr_0=np.zeros((20, 16, 16), np.uint8)),
        'large': dict(arr_0=np.zeros((20, 32, 32, 3), np.uint8)),
        'spatial': dict(mu=mu, sigma=sigma, mu_s=nan, sigma_s=sigma, count=100),
    }
    for name, arrays in kinds.items(): np.savez(folder/f'{name}.npz', **arrays)
    np.save(folder/'array', mu)
    (folder/'array.npy').rename(folder/'array.npz')
    (folder/'NAN.NPZ').write_bytes((folder/'nan.npz').read_bytes())
    (folder/'noise.npz').write_bytes(b'no zip')
    (folder/'cut.npz').write_bytes((folder/'large.npz').read_bytes()[:-200])
    (folder/'folder.npz').mkdir()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder as people have them: latents, a run, broken files, files in place of folders."
    folder = tmp_path_factory.mktemp('inputs')
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder/'latents', Encoding(flip=False), progress=False)
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
    configs = {'cut-vae': '{"_class_name": ', 'other-vae': '{"_class_name": "UNet2DModel"}',
               'bare-vae': '{"_class_name": "AutoencoderKL"}'}
    for name, config in configs.items():
        (folder/name).mkdir()
        (folder/name/'config.json').write_text(config)
    load_tokenizer('digits').save_pretrained(folder/'cut-record')
    (folder/'cut-record'/'tokenizer.json').write_text('{"transform"')
    references(folder)
    torch.save({'model': torch.nn.Linear(1, 1)}, folder/'object.pt')
    (folder/'noise.pt').write_bytes(b'noise')
    torch.save([torch.zeros(1)], folder/'list.pt')
    return folder


#: What is typed, and words of what is said.
COMMANDS = [
    ('slfm_encode digits digits new --size 0', 'size must be at least 1'),
    ('slfm_encode digits digits new --batch_size -4', 'batch_size must be at least 1'),
    ('slfm_encode digits digits new --shard_size 0', 'shard_size must be at least 1'),
    ('slfm_encode digits digits new --seed -2', 'seed must be -1 to'),
    ('slfm_analyze digits digits --size -16', 'size must be at least 1'),
    ('slfm_analyze digits digits --count 0', 'count must be at least 1'),
    ('slfm_analyze digits digits --pack 0', 'pack must be at least 1'),
    ('slfm_probe digits digits --count -1', 'count must be at least 1'),
    ('slfm_probe digits digits --sensitivity_count 0', 'sensitivity_count must be at least 1'),
    ('slfm_probe digits digits --batch_size 0', 'batch_size must be at least 1'),
    ('slfm_finetune digits digits new --steps 0', 'steps must be at least 1'),
    ('slfm_finetune digits digits new --lr nan', 'lr must be a finite number'),
    ('slfm_finetune digits digits new --lr -1', 'lr must be at least'),
    ('slfm_finetune digits digits new --held_out_count 0', 'held_out_count must be at least 1'),
    ('slfm_finetune digits digits new --discriminator_start -1', 'discriminator_start must be at least 0'),
    ('slfm_train latents new --steps -5', 'steps must be at least 1'),
    ('slfm_train latents new --batch_size 0', 'batch_size must be at least 1'),
    ('slfm_train latents new --lr 0', 'lr must be at least'),
    ('slfm_train latents new --lr inf', 'lr must be a finite number'),
    ('slfm_train latents new --warmup -1', 'warmup must be at least 0'),
    ('slfm_train latents new --ema_decay 1.5', 'ema_decay must be 0 to 1'),
    ('slfm_train latents new --label_dropout -0.1', 'label_dropout must be 0 to 1'),
    ('slfm_train latents new --keep -1', 'keep must be at least 0'),
    ('slfm_train latents new --accumulate 0', 'accumulate must be at least 1'),
    ('slfm_train latents new --max_grad_norm nan', 'max_grad_norm must be a finite number'),
    ('slfm_train latents new --log_every 0', 'log_every must be at least 1'),
    ('slfm_train latents new --classes 0', 'classes must be at least 1'),
    ('slfm_sample run new --count 0', 'count must be at least 1'),
    ('slfm_sample run new --steps 0', 'steps must be at least 1'),
    ('slfm_sample run new --label -3', 'label must be at least -1'),
    ('slfm_sample run new --guidance nan', 'guidance must be a finite number'),
    ('slfm_sample run new --guidance -1', 'guidance must be at least 0'),
    ('slfm_sample run new --tolerance 0', 'tolerance must be at least'),
    ('slfm_sample run new --step -7', 'step must be at least -1'),
    ('slfm_sample run new --seed 99999999999', 'seed must be -1 to'),
    ('slfm_evaluate digits digits --size -1', 'size must be at least 1'),
    ('slfm_evaluate digits digits --bootstrap -1', 'bootstrap must be at least 2'),
    ('slfm_evaluate digits digits --bootstrap 1', 'bootstrap must be at least 2'),
    ('slfm_evaluate run digits --count -1', 'count must be at least 1'),
    ('slfm_compare digits --steps -1', 'steps must be at least 1'),
    ('slfm_compare digits --samples -1', 'samples must be at least 1'),
    ('slfm_demo --seed -9', 'seed must be -1 to'),
    ('slfm_bench paths --rounds -1', 'rounds must be at least 1'),
    ('slfm_bench train --side 0', 'side must be at least 1'),
    ('slfm_bench sample --batch_size -1', 'batch_size must be at least 1'),
    ('slfm_train', 'required: latents, out; see slfm_train --help'),
    ('slfm_sample run new --count many', "invalid int value: 'many'"),
    ('slfm_demo --colour red', 'unrecognized arguments: --colour red; see'),
    ('slfm_demo --arms slerp', "unknown arm 'slerp': choose one of vanilla-linear"),
    ('slfm_compare nothing', "unknown preset 'nothing': choose one of digits"),
    ('slfm_train latents new --arm chord', 'unknown arm'),
    ('slfm_train latents new --model SiT-Z/9', 'unknown model'),
    ('slfm_train latents new --precision fp8', 'precision must be one of'),
    ('slfm_train latents new --time_sampling cosine', 'time_sampling must be one of'),
    ('slfm_train latents new --time_shift 0', 'time shift must be positive'),
    ('slfm_sample run new --method rk9', 'unknown method'),
    ('slfm_sample run new --precision fp8', 'float32 or bf16'),
    ('slfm_sample run new --label 77', 'class index 77 is out of range: this model knows classes 0 to 9'),
    ('slfm_sample run new --negative 10', 'negative class 10 is out of range'),
    ('slfm_sample run new --shift 0', 'time shift must be positive'),
    ('slfm_sample run new --step 9', 'no checkpoint of step 9, only 2'),
    ('slfm_encode digits digits new --dtype fp8 --size 16', 'float32 or bf16'),
    ('slfm_encode digits digits new --precision fp8 --size 16', 'float32 or bf16'),
    ('slfm_analyze digits digits --precision int4', 'precision must be'),
    ('slfm_analyze digits digits --statistics some', 'statistics must be'),
    ('slfm_probe digits digits --distances l2', 'unknown distance'),
    ('slfm_probe digits digits --neighbours near', 'neighbours must be'),
    ('slfm_probe digits lone --size 16', 'no class has two images'),
    ('slfm_finetune digits digits new --size 16 --arms both', 'arms must be among'),
    ('slfm_finetune digits digits new --size 16 --extractor vgg', 'unknown extractor'),
    ('slfm_evaluate digits digits --extractor vgg', 'unknown extractor'),
    ('slfm_evaluate run digits --extractor digits --size 16 --save gif', "save must be 'none', 'png' or 'npz'"),
    ('slfm_evaluate run digits --extractor digits --size 16 --method rk9', 'unknown method'),
    ('slfm_bench everything', 'unknown benchmark'),
    ('slfm_bench paths --side 8 --no_eager', 'paths has no option no_eager, side: give only rounds'),
    ('slfm_bench train --precision fp8', 'float32 or bf16'),
    ('slfm_bench sample --model SiT-Z/9', 'unknown model'),
    ('slfm_sample run new --guidance 2 --guide_from .9 --guide_to .1', 'guidance from 0.9 to 0.1 is an empty interval'),
    ('slfm_sample run new --guide_from .5 --guide_to .5', 'empty interval'),
    ('slfm_sample run new --guide_from 1.5 --guide_to 2', 'empty interval'),
    ('slfm_sample run new --guidance 2 --steps 4 --guide_from .3 --guide_to .4',
     'none of the 4 steps begins between 0.3 and 0.4'),
    ('slfm_train nothing new', 'make them with slfm_encode'),
    ('slfm_train file new', 'make them with slfm_encode'),
    ('slfm_train cut new', 'index.json is no .*make them with slfm_encode'),
    ('slfm_train foreign new', 'it holds no tokenizer; make them with slfm_encode'),
    ('slfm_train no-shard new', 'is missing: encode again'),
    ('slfm_train latents new --preset digits --resume file', 'file is no checkpoint'),
    ('slfm_train latents run --preset digits --resume never', 'resume is never'),
    ('slfm_train latents run --preset digits --lr 0.5', 'changed settings'),
    ('slfm_train latents new --preset digits --accumulate 7', 'cannot be divided among 1 processes that accumulate 7 times: choose a multiple of 7'),
    ('slfm_train latents new --preset digits --classes 5', 'labels go from 0 up to 9, but classes are 0 to 4'),
    ('slfm_sample file new', 'no checkpoint in file'),
    ('slfm_sample nowhere new', 'no checkpoint in nowhere'),
    ('slfm_sample run2 new', 'all checkpoints in run2 are damaged: remove them'),
    ('slfm_sample run new --tokenizer nothing', 'neither a known tokenizer'),
    ('slfm_encode no-tokenizer digits new', 'neither a known tokenizer'),
    ('slfm_encode cut-vae digits new', 'config.json is no config of an autoencoder'),
    ('slfm_encode other-vae digits new', "names 'UNet2DModel', which is not a diffusers autoencoder"),
    ('slfm_encode bare-vae digits new', 'no autoencoder at bare-vae'),
    ('slfm_encode cut-record digits new', 'tokenizer.json is no record of a tokenizer'),
    ('slfm_encode digits no-images.parquet new', 'no images at'),
    ('slfm_encode digits broken.parquet new', 'broken.parquet is no'),
    ('slfm_encode digits empty new', 'holds no images'),
    ('slfm_encode digits lone new --size 18', 'divisible by 4'),
    ('slfm_analyze digits empty --size 16', 'holds no images'),
    ('slfm_analyze digits lone --size 18', 'divisible by 4'),
    ('slfm_analyze digits broken --size 16', 'no readable image'),
    ('slfm_encode digits broken new --size 16', 'no readable image'),
    ('slfm_finetune digits digits new --size 16 --held_out broken', 'broken gave no readable image'),
    ('slfm_analyze no-vae digits', 'neither a known tokenizer'),
    ('slfm_analyze digits digits --out /proc/analysis --size 16 --count 32', 'cannot write'),
    ('slfm_sample run /proc/images --count 2 --steps 1', 'cannot write'),
    ('slfm_train latents /proc/run --preset digits --steps 1', 'cannot write'),
    ('slfm_evaluate digits short-sigma.npz --extractor digits --size 16',
     r'mu of short-sigma.npz has 64 values, but sigma has shape \(63, 63\)'),
    ('slfm_evaluate digits nan.npz --extractor digits --size 16', 'contains NaN or Inf: make the reference again'),
    ('slfm_evaluate digits inf.npz --extractor digits --size 16', 'contains NaN or Inf'),
    ('slfm_evaluate digits lopsided.npz --extractor digits --size 16', 'not symmetric'),
    ('slfm_evaluate digits negative.npz --extractor digits --size 16', 'negative variance'),
    ('slfm_evaluate digits few.npz --extractor digits --size 16', 'made from 3 images, too few'),
    ('slfm_evaluate digits odd-count.npz --extractor digits --size 16', 'count of odd-count.npz is no number'),
    ('slfm_evaluate digits words.npz --extractor digits --size 16', 'are no numbers'),
    ('slfm_evaluate digits wide.npz --extractor digits --size 16', 'statistics of 8 features, digits has 64'),
    ('slfm_evaluate digits half.npz --extractor digits --size 16', 'neither statistics .* nor images'),
    ('slfm_evaluate digits grey.npz --extractor digits --size 16', 'must be uint8'),
    ('slfm_evaluate digits large.npz --extractor digits --size 16', 'digits has 16 px; large.npz has 32 px: give sets of one size'),
    ('slfm_evaluate digits spatial.npz --extractor digits --size 16', 'mu_s or sigma_s'),
    ('slfm_evaluate digits array.npz --extractor digits --size 16', 'a single array'),
    ('slfm_evaluate digits noise.npz --extractor digits --size 16', 'no .npz reference'),
    ('slfm_evaluate digits cut.npz --extractor digits --size 16', 'no .npz reference'),
    ('slfm_evaluate digits folder.npz --extractor digits --size 16', 'no .npz file at'),
    ('slfm_evaluate digits missing.npz --extractor digits --size 16', 'no .npz file at'),
    ('slfm_evaluate digits NAN.NPZ --extractor digits --size 16', 'contains NaN or Inf'),
    ('slfm_evaluate nowhere.npz digits --extractor digits --size 16', 'no .npz file at nowhere.npz'),
    ('slfm_evaluate nowhere.parquet digits --extractor digits --size 16', 'no images at'),
    ('slfm_evaluate empty digits --extractor digits --size 16', 'holds no images'),
    ('slfm_evaluate lone digits --extractor digits --size 16', '1 samples are too few'),
    ('slfm_evaluate digits digits --extractor digits --size 16 --against latents',
     'latents is no result of slfm_evaluate'),
    ('slfm_evaluate digits digits --extractor digits --size 16 --against nothing.json', 'nothing.json is missing'),
    ('slfm_evaluate digits digits --extractor digits --size 16 --against cut.json',
     'cut.json is no result of slfm_evaluate'),
    ('slfm_evaluate digits digits --extractor digits --size 16 --against list.json',
     'list.json is no result of slfm_evaluate'),
    ('slfm_evaluate digits digits --extractor digits --size 16 --against foreign.json',
     'foreign.json is no result of slfm_evaluate'),
]


def refused(argv: list[str]) -> str:
    "The sentence with which a command ends."
    with pytest.raises(SystemExit) as e: getattr(cli, argv[0])(argv[1:])
    assert isinstance(e.value.code, str), f'ended with {e.value.code!r}'
    return e.value.code


@pytest.mark.parametrize('line,words', COMMANDS, ids=[line.replace('/', '|') for line, _ in COMMANDS])
def test_commands_refuse_with_one_sentence(place, line, words, monkeypatch, capfd):
    argv = line.split()
    monkeypatch.chdir(place)
    before = tree(place)
    told = refused(argv)
    assert told.startswith(f'{argv[0]}: ') and re.search(words, told), told
    assert len(told) < 330 and '\n' not in told and 'Traceback' not in told, told
    assert REMEDY.search(told), told
    assert tree(place) == before
    assert 'Traceback' not in capfd.readouterr().err


def digits(side: int = 4, classes: int = 10) -> SiT:
    "A small untrained network for digit latents."
    return SiT.from_name('SiT-Ti/2', input_size=side, in_channels=16, num_classes=classes).requires_grad_(False)


def draw(**options):
    "Two samples of an untrained network."
    return sample(digits(), SlerpPath(), torch.tensor([1, 2]), Sampler(**dict(steps=2) | options))


def encode(place: Path, source: ImageSource | None = None, **options):
    "Latents of digits or of another source."
    return encode_latents(load_tokenizer('digits'), source or ImageSource('digits'), place/'new', Encoding(**options))


def pipeline(**options):
    "The same through diffusers."
    pipe = SphericalSiTPipeline(digits(), FlowScheduler(), load_tokenizer('digits', spherical=True).autoencoder)
    return pipe(**dict(class_labels=[1, 2], num_inference_steps=2) | options)


def scored(**changes):
    "Figures of random features, some of them spoilt."
    g = torch.Generator().manual_seed(0)
    parts = {'features': torch.randn(20, 8, generator=g), 'logits': torch.randn(20, 10, generator=g)}
    return score_features(parts | changes, {'features': torch.randn(20, 8, generator=g)})


FUNCTIONS = [
    (lambda p: draw(steps=0), ValueError, 'steps must be at least 1'),
    (lambda p: sample(digits(), SlerpPath(), torch.tensor([1]), batch_size=0), ValueError, 'batch_size must be at least 1'),
    (lambda p: sample(digits(), SlerpPath(), torch.tensor([1]), noise=torch.randn(2, 16, 4, 4)), ValueError, r'noise must be \[1, 16, 4, 4\]'),
    (lambda p: draw(shift=0), ValueError, 'time shift must be positive'),
    (lambda p: draw(shift=math.inf), ValueError, 'time shift must be positive and finite'),
    (lambda p: draw(method='adaptive', tolerance=0), ValueError, 'tolerance must be at least'),
    (lambda p: draw(guidance=math.nan), ValueError, 'guidance must be a finite number'),
    (lambda p: draw(guidance=-2.), ValueError, 'guidance must be at least 0'),
    (lambda p: draw(interval=(.9, .1)), ValueError, 'empty interval'),
    (lambda p: draw(guidance=2., interval=(.6, .9)), ValueError, 'none of the 2 steps'),
    (lambda p: draw(precision='fp16'), ValueError, 'precision must be float32 or bf16'),
    (lambda p: sample(digits(), SlerpPath(), torch.tensor([1.5])), ValueError, 'classes must be integers'),
    (lambda p: sample(digits(), SlerpPath(), torch.tensor([-1])), ValueError, 'class index -1 is out of range'),
    (lambda p: pipeline(class_labels=[10]), ValueError, 'knows classes 0 to 9'),
    (lambda p: pipeline(negative_class=12), ValueError, 'negative class 12'),
    (lambda p: pipeline(guidance_interval=(1., 0.)), ValueError, 'empty interval'),
    (lambda p: pipeline(num_inference_steps=0), ValueError, 'at least 1'),
    (lambda p: shift_time(torch.tensor(.5), -1), ValueError, 'must be positive'),
    (lambda p: TrainConfig(lr=0.), ValueError, 'lr must be at least'),
    (lambda p: tracker_names('tensorboard, abacus'), ValueError, "unknown tracker 'abacus': choose of .*tensorboard"),
    (lambda p: TrainConfig(weight_decay=-1.), ValueError, 'weight_decay must be at least 0'),
    (lambda p: FinetuneConfig(ema_decay=2.), ValueError, 'ema_decay must be 0 to 1'),
    (lambda p: FinetuneConfig(discriminator_layers=0), ValueError, 'discriminator_layers must be at least 1'),
    (lambda p: encode(p, batch_size=0), ValueError, 'batch_size must be at least 1'),
    (lambda p: encode(p, shard_size=-1), ValueError, 'shard_size must be at least 1'),
    (lambda p: encode(p, ImageSource(p/'lone', 18)), ValueError, 'divisible by 4'),
    (lambda p: LatentDataset(p/'file'), FileNotFoundError, 'make them with slfm_encode'),
    (lambda p: LatentDataset(p/'foreign'), ValueError, 'holds no tokenizer'),
    (lambda p: load_run(p/'run', 99), FileNotFoundError, 'no checkpoint of step 99, only 2'),
    (lambda p: SiT.from_sit_checkpoint(p/'nothing.pt'), FileNotFoundError, 'no checkpoint at'),
    (lambda p: SiT.from_sit_checkpoint(p/'empty'), FileNotFoundError, 'no checkpoint at'),
    (lambda p: open_tensors(p/'noise.pt'), ValueError, 'damaged or no checkpoint'),
    (lambda p: open_tensors(p/'list.pt'), ValueError, 'no named tensors, but a list'),
    (lambda p: open_tensors(p/'object.pt'), ValueError, 'more than tensors .*Linear.*: save its state dict alone'),
    (lambda p: load_reference(p/'short-sigma.npz', 'digits'), ValueError, 'sigma has shape'),
    (lambda p: load_reference(p/'wide.npz', 'digits'), ValueError, 'give the extractor it was made with'),
    (lambda p: npz_batches(p/'half.npz'), ValueError, 'neither statistics'),
    (lambda p: source_batches(p/'nothing.npz'), FileNotFoundError, 'no .npz file'),
    (lambda p: source_batches(p/'empty'), FileNotFoundError, 'holds no images'),
    (lambda p: source_batches('digits', batch_size=0), ValueError, 'batch_size must be at least 1'),
    (lambda p: feature_function('digits')(torch.zeros(1, 3, 32, 32)), ValueError, 'give size 16'),
    (lambda p: scored(features=torch.full((20, 8), math.nan)), ValueError, 'NaN or Inf'),
    (lambda p: scored(logits=torch.full((20, 10), math.inf)), ValueError, 'NaN or Inf'),
    (lambda p: scored(features=torch.randn(5, 8)), ValueError, '5 samples are too few'),
    (lambda p: read_json(p/'empty', 'record', 'make one'), ValueError, 'is no record'),
    (lambda p: write_json(p/'new.json', {'a': {'fid': [1., math.nan]}}), ValueError, 'new.json is not written: a.fid.1 is NaN'),
    (lambda p: load_tokenizer(p/'cut-vae'), ValueError, 'no config of an autoencoder'),
]


@pytest.mark.parametrize('call,kind,words', FUNCTIONS, ids=[w for _, _, w in FUNCTIONS])
def test_functions_refuse_with_one_sentence(place, call, kind, words):
    before = tree(place)
    with pytest.raises(kind, match=words) as e: call(place)
    assert len(str(e.value)) < 330 and REMEDY.search(str(e.value)), e.value
    assert tree(place) == before


def test_a_bug_keeps_its_traceback(place, monkeypatch, capfd):
    "Errors of numpy, torch or Python are no sentences, whatever their type; --debug shows where a sentence comes from."
    cross_entropy = torch.nn.functional.cross_entropy
    bugs = {
        'numpy': lambda *a, **k: np.zeros(3).reshape(2),
        'torch': lambda *a, **k: cross_entropy(torch.zeros(2, 3), torch.zeros(4, dtype=torch.long)),
        'python': lambda *a, **k: int('x'),
        'json': lambda *a, **k: json.loads('{'),
        'file': lambda *a, **k: open('/no/such/file').read(),
    }
    for bug in bugs.values():
        monkeypatch.setattr(cli, 'load_tokenizer', bug)
        with pytest.raises((ValueError, OSError)): cli.slfm_encode(['digits', 'digits', 'new'])
    monkeypatch.undo()
    monkeypatch.chdir(place)
    with pytest.raises(FileNotFoundError, match='make them with slfm_encode') as e:
        cli.slfm_train(['nothing', 'new', '--debug'])
    assert isinstance(e.value.__cause__, FileNotFoundError)
    script = """
import numpy, spherical_lfm.tools.cli as cli
cli.load_tokenizer = lambda *a, **k: numpy.zeros(3).reshape(2)
cli.slfm_encode(["digits", "digits", "new"])"""
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=place)
    assert result.returncode == 1 and 'Traceback' in result.stderr and 'cannot reshape' in result.stderr


def test_what_the_machine_refuses_is_a_sentence(place, monkeypatch):
    monkeypatch.chdir(place)
    def full(*a, **k): raise OSError(28, 'No space left on device', 'somewhere')
    def memory(*a, **k): raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
    for fault, words in ((full, 'No space left on device.*free some space'), (memory, 'not enough memory: lower')):
        monkeypatch.setattr(np, 'load', fault) # outside of the package
        assert re.search(words, refused(['slfm_evaluate', 'large.npz', 'large.npz', '--extractor', 'digits'])), fault


@pytest.mark.parametrize('name', [n for n in dir(cli) if n.startswith('slfm_')])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as e: getattr(cli, name)(['--help'])
    shown = capsys.readouterr().out
    assert e.value.code == 0 and len(shown) > 300 and 'usage' in shown and '--debug' in shown and '--pdb' not in shown


@pytest.mark.parametrize('name', ['slfm_evaluate', 'slfm_train'])
def test_help_on_a_terminal_without_unicode(name):
    code = f'import atexit, sys; atexit.register(lambda: sys.stderr.write(" ".join(sys.modules))); from spherical_lfm.tools import cli; cli.{name}(["--help"])'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, env=os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'}, timeout=120)
    assert result.returncode == 0 and result.stdout.isascii() and b'usage' in result.stdout, result.stderr[-500:]
    late = {b'diffusers.models.autoencoders.vae', b'diffusers.pipelines.pipeline_utils', b'sklearn', b'matplotlib', b'datasets', b'lpips'}
    assert not late & set(result.stderr.split()), 'seconds that nobody who asks for help wants to wait'


def test_own_warnings_are_lines_and_those_of_libraries_are_silent(capsys, caplog):
    import warnings
    @cli.command
    def work():
        "Warn twice."
        warnings.warn_explicit('of a library', UserWarning, 'x.py', 1, module='torch.nn')
        logging.getLogger('diffusers.models').error('of a library')
        warnings.warn_explicit('ours', UserWarning, 'x.py', 1, module='spherical_lfm.decoder')
    work([])
    assert capsys.readouterr().err == 'work: ours\n' and not caplog.records
    logging.getLogger('diffusers.models').error('heard again')
    assert [r.message for r in caplog.records] == ['heard again']


def test_pil_images_are_rounded():
    "As `to_uint8` does it; cutting off would make every picture half a level darker."
    model, tokenizer = digits(), load_tokenizer('digits', spherical=True)
    pipe = SphericalSiTPipeline(model, FlowScheduler(), tokenizer.autoencoder, tokenizer.transform.config)
    pipe.set_progress_bar_config(disable=True)
    def drawn(kind: str):
        g = torch.Generator().manual_seed(0)
        return pipe([3, 4], num_inference_steps=2, generator=g, output_type=kind).images
    draws = [drawn('pil'), drawn('pt')]
    pictures = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in draws[0]])
    values = (draws[1].clamp(-1, 1) + 1)*127.5 if draws[1].min() < 0 else draws[1]*255
    assert (pictures - values).abs().max() <= .5 + 1e-3


@pytest.mark.parametrize('wrap', [
    lambda w: {'state_dict': w},
    lambda w: {'model_state_dict': w, 'optimizer_state_dict': {'state': {}, 'param_groups': [{'lr': 1e-4}]}},
    lambda w: {'model': {k: v*0 for k, v in w.items()}, 'ema': w, 'opt': {}},
    lambda w: {'epoch': 3, 'nested': {'state_dict': {f'module.{k}': v*0 for k, v in w.items()},
                                      'state_dict_ema': {f'module.{k}': v for k, v in w.items()}}},
    lambda w: {f'_orig_mod.{k}': v for k, v in w.items()},
    lambda w: {f'module._orig_mod.{k}': v for k, v in w.items()},
    lambda w: {'state_dict': {f'net.{k}': v*0 for k, v in w.items()} | {f'ema_model.{k}': v for k, v in w.items()}
                             | {'loss.weight': torch.zeros(1)}},
    lambda w: {k.replace('blocks.0.', 'blocks.0._orig_mod.'): v for k, v in w.items()},
    lambda w: {'model': w, 'results': Path('runs')/'a', 'windows': PureWindowsPath('C:/runs')},
    lambda w: {'model': w, 'loss': np.float64(.5), 'step': np.int64(7), 'args': argparse.Namespace(out=Path('x'))},
])
def test_checkpoints_under_any_keys(wrap, tmp_path):
    model = digits()
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for p in model.parameters(): p += .01*torch.randn(p.shape, generator=g)
    torch.save(wrap(model.state_dict()), tmp_path/'sit.pt')
    found = SiT.from_sit_checkpoint(tmp_path/'sit.pt')
    for (k, a), b in zip(model.state_dict().items(), found.state_dict().values()): assert torch.equal(a, b), k


def test_half_precision_weights_alone_are_loaded(tmp_path):
    tokenizer = load_tokenizer('digits')
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path/'diffusion_pytorch_model.safetensors'
    save_file({k: v.half() for k, v in load_file(file).items()}, tmp_path/'diffusion_pytorch_model.fp16.safetensors')
    file.unlink()
    found = load_tokenizer(tmp_path)
    images = digits_images('test')[0][:8]
    assert next(found.autoencoder.parameters()).dtype == torch.float32
    torch.testing.assert_close(found.encode(images), tokenizer.encode(images), atol=.02, rtol=.02)


class Hub(http.server.BaseHTTPRequestHandler):
    "A hub with a gated repository, one that lacks a file, one that has all, and no others."
    def do_HEAD(self):
        kind = next((k for k in ('FLUX', 'taef2', 'sd-vae') if k in self.path), None)
        code = 200 if self.path == '/' or kind == 'sd-vae' else 403 if kind == 'FLUX' else 404
        self.send_response(code)
        if code == 200:
            body = b'{"_class_name": "AutoencoderKL"}'
            headers = {'ETag': '"1"', 'X-Repo-Commit': 'f'*40, 'Content-Length': str(len(body))}
        else: headers = {'X-Error-Code': {'FLUX': 'GatedRepo', 'taef2': 'EntryNotFound'}.get(kind, 'RepoNotFound')}
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()
        if code == 200 and self.command == 'GET': self.wfile.write(body)

    do_GET = do_HEAD
    def log_message(self, *args): pass


def test_why_the_hub_has_nothing_to_give(tmp_path):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """
import sys
from huggingface_hub import constants
from spherical_lfm.tokenizers import load_tokenizer
for name in ('flux2', 'taef2', 'repae-flux1', 'sd'):
    if name == 'sd': constants.HF_HOME, constants.HF_HUB_CACHE = '/proc/none', '/proc/none/hub'
    try: load_tokenizer(name)
    except OSError as e: print(e)"""
    address = f'http://127.0.0.1:{server.server_port}'
    env = os.environ | {'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path), 'NO_PROXY': '*'}
    for k in ('HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE'): env.pop(k, None)
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=env, check=True)
    gated, lacking, nowhere, closed = result.stdout.splitlines()
    assert 'gated: accept the licence on http' in gated and 'FLUX.2-dev and log in with `hf auth login`' in gated
    assert 'the repository has no such file' in lacking
    assert 'no such public repository' in nowhere
    assert 'the cache /proc/none cannot be written' in closed and 'set HF_HOME' in closed
    server.shutdown()


def offline(monkeypatch, home: Path):
    "No network, and an empty cache of torch."
    for k in ('HTTPS_PROXY', 'https_proxy'): monkeypatch.setenv(k, 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(home))


@pytest.mark.parametrize('weights,words', [
    (None, 'Inception weights could not be loaded.*connect to the network once, or choose another extractor'),
    (b'PK cut off', r'weights-inception-2015-12-05-6726825d.pth are damaged or foreign .*: remove this file'),
    ('foreign', 'are damaged or foreign'),
    ('closed', 'cannot be written, so set TORCH_HOME'),
])
def test_inception_without_its_weights(weights, words, place, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    file = tmp_path/'hub'/'checkpoints'/'weights-inception-2015-12-05-6726825d.pth'
    if weights == 'closed': monkeypatch.setenv('TORCH_HOME', '/proc/none')
    elif weights:
        file.parent.mkdir(parents=True)
        if weights == 'foreign': torch.save({'w': torch.zeros(1)}, file)
        else: file.write_bytes(weights)
    monkeypatch.chdir(place)
    assert re.search(words, refused(['slfm_evaluate', 'digits', 'digits']))
    assert file.exists() == (weights in (b'PK cut off', 'foreign'))


@pytest.mark.parametrize('argv,words', [
    (['slfm_probe', 'digits', 'digits', '--distances', 'lpips-vgg'], 'vgg that LPIPS needs .*choose another distance'),
    (['slfm_finetune', 'digits', 'digits', 'new', '--size', '16'], 'choose perceptual none or efficientnet'),
])
def test_perceptual_weights_that_cannot_be_had(argv, words, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert re.search(words, refused(argv))


def test_damaged_weights_of_lpips_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    file = tmp_path/'hub'/'checkpoints'/'alexnet-owt-7be5be79.pth'
    file.parent.mkdir(parents=True)
    file.write_bytes(b'PK cut off')
    with pytest.raises(ValueError, match='alexnet-owt-7be5be79.pth are damaged .*: remove this file'):
        lpips_distance('alex')
    (tmp_path/'vit.safetensors').write_bytes(b'noise')
    with pytest.raises(ValueError, match='vit.safetensors holds no weights of DINOv2'):
        semantic_features('dinov2', tmp_path/'vit.safetensors')


def test_classes_of_a_set_without_its_last_one(place, tmp_path, monkeypatch):
    "The architecture follows from the classes that the source named, or from --classes, not from the images."
    index = json.loads((place/'latents'/'index.json').read_text())
    (tmp_path/'latents').mkdir()
    for f in (place/'latents').glob('*.safetensors'): (tmp_path/'latents'/f.name).write_bytes(f.read_bytes())
    index['source']['classes'] = {str(k): 1 for k in range(13)}
    write_json(tmp_path/'latents'/'index.json', index)
    assert LatentDataset(tmp_path/'latents').classes == 13 and LatentDataset(place/'latents').classes == 10
    cli.slfm_train([str(place/'latents'), str(tmp_path/'run'), '--preset', 'digits', '--steps', '1', '--classes', '12'])
    model, _, record = load_run(tmp_path/'run')
    assert record['classes'] == model.config.num_classes == 12


def test_capitals_make_no_other_kind_of_file(place, tmp_path):
    images = to_uint8(digits_images('test')[0][:20])
    for name in ('a.npz', 'B.NPZ'):
        with open(tmp_path/name, 'wb') as f: np.savez(f, arr_0=images.permute(0, 2, 3, 1).numpy())
    a, b = (torch.cat(list(source_batches(tmp_path/name))) for name in ('a.npz', 'B.NPZ'))
    assert torch.equal(a, b) and torch.equal(a, images)


def test_statistics_without_a_count_are_used_and_said_so(tmp_path):
    np.savez(tmp_path/'adm.npz', mu=np.zeros(64), sigma=np.eye(64))
    with pytest.warns(UserWarning, match='does not say how many images'):
        found = load_reference(tmp_path/'adm.npz', 'digits')
    assert 'count' not in found and found['sigma'].shape == (64, 64)


def test_a_wrong_samples_path_is_found_before_the_reference_is_read(place, monkeypatch):
    read = []
    monkeypatch.chdir(place)
    monkeypatch.setattr(cli, 'extract_features', lambda *a, **k: read.append(a))
    for samples in ('nowhere.parquet', 'nowhere.npz', 'run2'):
        refused(['slfm_evaluate', samples, 'digits', '--extractor', 'digits', '--size', '16'])
    assert not read


def test_logs_hold_no_nan(tmp_path):
    "A gradient that overflowed once is null in the log, which every reader of JSON takes."
    from types import SimpleNamespace

    from spherical_lfm.engine.runs import ResumableRun
    told = []
    accelerator = SimpleNamespace(is_main_process=True, log=lambda row, step: told.append((step, row)))
    run = SimpleNamespace(out=tmp_path, accelerator=accelerator)
    ResumableRun._log(run, {'step': 3, 'loss': 1.5, 'grad_norm': math.inf, 'quarter': None})
    found = json.loads((tmp_path/'log.jsonl').read_text(), parse_constant=pytest.fail)
    assert found == {'step': 3, 'loss': 1.5, 'grad_norm': None, 'quarter': None}
    assert told == [(3, {'loss': 1.5})], 'trackers get the numbers'
