"""What a run holds, per machine: latents in their files or where they were asked for, checkpoints, threads; and placements that no other test combines.

As a script, `torchrun test_memory.py LATENTS OUT`, it is what two gloo processes do for these tests.
"""
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from diffusers import AutoencoderKL
from forked import SERVER
from safetensors import safe_open
from safetensors.torch import save_file

from spherical_lfm import decoder, sit, training
from spherical_lfm import experiments as ex
from spherical_lfm.decoder import DecoderTrainer, FinetuneConfig
from spherical_lfm.engine import features, weights
from spherical_lfm.engine import latents as lt
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import LatentDataset, encode_latents, free_bytes, place_latents
from spherical_lfm.engine.runs import checkpoints, keep_newest, seal
from spherical_lfm.sampling import load_run
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import cli
from spherical_lfm.tools.bench import _random_latents
from spherical_lfm.training import TrainConfig, Trainer, matmul_peak

SMALL = dict(model='SiT-Ti/2', batch_size=16, log_every=1, lr=2e-3, ema_decay=.9)
MIB = 2**20
HOST, GPU = torch.device('cpu'), torch.device('cuda', 0)


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    "Two hundred digits and their mirror images, in shards of sixty."
    folder = tmp_path_factory.mktemp('memory')/'latents'
    encoding = lt.Encoding(shard_size=60)
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder, encoding, torch.arange(200), progress=False)
    return folder


@pytest.fixture(autouse=True)
def little(monkeypatch):
    "How a network is placed matters here, not how large it is."
    monkeypatch.setitem(sit.SIZES, 'Ti', (64, 1, 2))


def losses(run): return [json.loads(line)['loss'] for line in (Path(run)/'log.jsonl').read_text().splitlines()]


# --- latents ---

def anonymous() -> int:
    "Bytes of this process that belong to no file."
    row = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('RssAnon:'))
    return int(row.split()[1])*1024


def _go_through(folder: Path, out: Path):
    "Open a cache, read all of it in batches, then bring it to a place that is not this process's own memory."
    torch.set_num_threads(1)
    begin, seen = anonymous(), []
    data = LatentDataset(folder, project=project)
    for at in torch.arange(len(data)).split(128):
        data.batch(at)
        seen.append(anonymous() - begin)
    empty, check = torch.empty, lt.check_tokens

    def in_a_file(*shape, dtype, device): # stands for a device
        count = torch.Size(shape).numel()
        return torch.from_file(str(out.with_suffix('.device')), shared=True, size=count, dtype=dtype).view(shape)

    def noted(z, *args, **options):
        seen.append(anonymous() - begin)
        check(z, *args, **options)
        seen.append(anonymous() - begin)
    torch.empty, lt.check_tokens = in_a_file, noted
    moved = data.to('cpu')
    seen.append(anonymous() - begin)
    torch.empty, lt.check_tokens = empty, check
    some = torch.arange(0, len(data), 100)
    same = torch.equal(moved.batch(some)[0], data.batch(some)[0])
    out.write_text(json.dumps({'bytes': data.bytes, 'most': max(seen), 'same': same, 'mapped': data.z is None}))


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='tells anonymous memory from mapped files on Linux only')
def test_a_cache_is_opened_and_read_without_a_copy(tmp_path):
    (tmp_path/'z').mkdir()
    _random_latents(tmp_path/'z', 16_384, 16)
    process = SERVER.Process(target=_go_through, args=(tmp_path/'z', tmp_path/'found'))
    process.start()
    process.join(600)
    found = json.loads((tmp_path/'found').read_text())
    shutil.rmtree(tmp_path/'z')
    assert process.exitcode == 0 and found['bytes'] == 256*MIB
    assert found['most'] < 60*MIB and found['same'] and found['mapped']


def test_a_moved_set_is_another_one(latents):
    data = LatentDataset(latents, project=project)
    moved, at, flips = data.to('cpu'), torch.arange(0, 200, 3), torch.arange(67) % 2 == 0
    assert data.z is None and moved is not data and moved._maps == [] and len(data._maps) == 4
    assert {k: tuple(v.shape) for k, v in moved.z.items()} == {k: (200, 16, 4, 4) for k in ('z', 'z_flip')}
    for a, b in zip(moved.batch(at, flips), data.batch(at, flips)): assert torch.equal(a, b)
    assert torch.equal(moved.to('cpu').z['z_flip'], moved.z['z_flip']) and moved.content == data.content
    assert torch.equal(LatentDataset(latents, resident=True).z['z'], moved.z['z'])


@pytest.mark.parametrize('resident,device,free,processes,outcome', [
    ('auto', GPU, 3, 8, 'moved'), ('auto', GPU, 2.99, 1, 'stays'), ('auto', HOST, 1e9, 1, 'stays'), ('no', GPU, 1e9, 1, 'stays'),
    ('gpu', GPU, 1, 8, 'moved'), ('gpu', GPU, .99, 1, 'do not fit into the .* GiB that are free on cuda:0: choose'),
    ('gpu', HOST, 1e9, 1, 'needs a GPU, and this process has none: choose'), ('host', GPU, 8, 8, 'moved'), ('host', HOST, 1, 1, 'moved'),
    ('host', HOST, 7.99, 8, 'GiB of latents for each of 8 processes do not fit into the .* GiB that are free in host memory: choose')])
def test_where_latents_lie(latents, monkeypatch, resident, device, free, processes, outcome):
    "`free` is in sizes of the set: what is free where it would go."
    data, asked = LatentDataset(latents), []
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    monkeypatch.setattr(lt, 'free_bytes', lambda where: (asked.append(where.type), int(free*data.bytes) + (free == 3))[1])
    monkeypatch.setattr(LatentDataset, 'to', lambda self, where: ('moved', torch.device(where)))
    if outcome == 'stays': assert place_latents(data, resident, device) is data
    elif outcome == 'moved': assert place_latents(data, resident, device) == ('moved', HOST if resident == 'host' else device)
    else:
        with pytest.raises(ValueError, match=outcome): place_latents(data, resident, device)
    assert set(asked) <= {'cpu' if resident == 'host' else device.type}


def test_free_memory_of_a_gpu_is_what_the_allocator_keeps_unused_as_well(monkeypatch):
    for name, value in (('mem_get_info', (10, 100)), ('memory_reserved', 7), ('memory_allocated', 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(GPU) == 13
    t, asked = load_tokenizer('digits'), []
    t.images_that_fit(16, 16)
    monkeypatch.setattr('spherical_lfm.tokenizers.free_bytes', lambda where: (asked.append(where), 2*5*t._bytes[16, 16])[1])
    assert t.images_that_fit(16, 16) == 5 and asked == [HOST]


def test_a_run_may_read_from_elsewhere_when_it_resumes(latents, tmp_path):
    data = LatentDataset(latents, project=project)

    def fit(out, steps, resident):
        trainer = Trainer(TrainConfig(steps=steps, resident=resident, **SMALL), data, tmp_path/out)
        trainer.fit(progress=False)
        return trainer
    assert fit('whole', 4, 'auto').data is data
    fit('parts', 2, 'no')
    trainer = fit('parts', 4, 'host')
    assert trainer.data.z['z'].shape == (200, 16, 4, 4) and data.z is None
    assert losses(tmp_path/'parts') == losses(tmp_path/'whole') and len(losses(tmp_path/'whole')) == 4
    with pytest.raises(ValueError, match='resident must be one of'): TrainConfig(resident='disk')
    with pytest.raises(ValueError, match='needs a GPU'): Trainer(TrainConfig(resident='gpu', **SMALL), data, tmp_path/'gpu')


def test_the_command_says_where_latents_may_lie(capsys):
    with pytest.raises(SystemExit): cli.slfm_train(['--help'])
    told = ' '.join(capsys.readouterr().out.split())
    assert '--resident RESIDENT' in told and "on the 'gpu', a copy on the 'host', 'no' (files); 'auto': gpu if they fit" in told


def test_reading_ahead_finds_the_tensors_in_a_file(latents):
    "Where the safetensors library has them; and exactly the rows that are wanted, from the start of a piece on."
    data = LatentDataset(latents, project=project)
    place = latents/data.index['shards'][0]['file']
    with open(place, 'rb', buffering=0) as f, safe_open(place, 'pt') as known:
        for k in ('z', 'z_flip'):
            f.seek(lt._start_of(f, k))
            stored = known.get_tensor(k)
            assert f.read(stored.nbytes) == stored.numpy().tobytes()
        lt._read_pieces(f, 100, 250, 420, piece=100) # begins at 200 of the tensor, ends with the piece that holds 419
        assert f.tell() == 600


def test_windows_are_read_ahead_from_the_first_on(latents, tmp_path, monkeypatch):
    "An epoch of 200 in windows of 64, 64, 64 and 8; a step takes 16."
    asked = []
    monkeypatch.setattr(LatentDataset, 'read_ahead', lambda self, images: asked.append(images.tolist()))

    def fit(until):
        trainer = Trainer(TrainConfig(steps=40, window=64, **SMALL), LatentDataset(latents, project=project), tmp_path)
        trainer.fit(until=until, progress=False)
        for thread in threading.enumerate():
            if thread.name == 'slfm-ahead': thread.join()
        return trainer.order
    order = fit(3)
    windows = [w.tolist() for epoch in (0, 1) for w in order._shuffle(epoch).split(64)]
    assert [len(w) for w in windows] == [64, 64, 64, 8]*2
    assert asked == windows[0:2] and set(order.indices(0).tolist()) <= set(asked[0])
    asked.clear()
    order = fit(7) # goes on in the window that it had begun, and enters the next one
    assert asked == windows[0:3]
    asked.clear()
    fit(15) # step 7 is in the middle of window 1, step 13 in the first of the next epoch
    assert asked == windows[1:6] and set(order.indices(7).tolist()) <= set(asked[0])


# --- checkpoints ---

def numbers(run): return [int(c.name.removeprefix('step-')) for c in checkpoints(run)]


@pytest.mark.parametrize('more,kept', [({}, [3, 4, 5]), (dict(keep=0), [1, 2, 3, 4, 5]), (dict(keep=1), [5])])
def test_three_checkpoints_stay(latents, tmp_path, more, kept):
    Trainer(TrainConfig(steps=5, checkpoint_every=1, **SMALL | more), LatentDataset(latents, project=project), tmp_path/'run').fit(progress=False)
    assert numbers(tmp_path/'run') == kept
    config = FinetuneConfig(steps=5, checkpoint_every=1, batch_size=4, perceptual='none', discriminator_width=8, **more)
    DecoderTrainer(load_tokenizer('digits'), digits_images('train')[0][:16], config, tmp_path/'decoder').fit(progress=False)
    assert numbers(tmp_path/'decoder') == kept


def test_what_was_just_written_is_never_too_old(latents, tmp_path):
    "A run that goes on from an earlier checkpoint: those of its other future neither count nor go."
    for step in (1, 2, 3, 8, 9):
        folder = tmp_path/'checkpoints'/f'step-{step:08d}'
        folder.mkdir(parents=True)
        seal(folder, {'step': step})
    keep_newest(tmp_path/'checkpoints'/'step-00000003', 2)
    assert numbers(tmp_path) == [2, 3, 8, 9]
    keep_newest(tmp_path/'checkpoints'/'step-00000009', 0)
    assert numbers(tmp_path) == [2, 3, 8, 9]


class Stop(Exception): pass


@pytest.mark.parametrize('curve,train,keep', [(True, {}, 0), (False, {}, 3), (True, {'keep': 5}, 5)])
def test_a_curve_keeps_what_it_scores(latents, tmp_path, monkeypatch, curve, train, keep):
    def stop(config, data, out):
        assert config.keep == keep
        raise Stop
    monkeypatch.setattr(ex, 'Trainer', stop)
    preset = replace(ex.PRESETS['digits'], train=ex.PRESETS['digits'].train | train)
    with pytest.raises(Stop): ex.run_arm(preset, 'spherical-slerp', latents, {}, tmp_path, curve=curve)


# --- what a run sets and measures before it steps ---

@pytest.fixture
def products():
    "Whatever a test does to the precision of products, it is undone."
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_every_run_states_how_precise_products_are(latents, tmp_path, monkeypatch, products):
    first = Trainer(TrainConfig(steps=1, **SMALL), LatentDataset(latents, project=project), tmp_path/'first')
    torch.set_float32_matmul_precision('high')
    first.fit(progress=False)
    assert torch.get_float32_matmul_precision() == 'highest', 'there is no TF32 on a CPU'
    monkeypatch.setattr(training, 'matmul_peak', lambda *_: 1.)
    trainers = [Trainer(TrainConfig(steps=1, tf32=t, **SMALL), LatentDataset(latents, project=project), tmp_path/f'{t}') for t in (True, False)]
    for trainer, precision in zip(trainers, ('high', 'highest')):
        trainer.device = GPU
        trainer.out.mkdir()
        trainer._open()
        assert torch.get_float32_matmul_precision() == precision


def test_the_peak_is_measured_before_the_first_step_and_draws_nothing(latents, tmp_path, monkeypatch, products):
    trainer, events = Trainer(TrainConfig(steps=2, **SMALL), LatentDataset(latents, project=project), tmp_path), []
    step, measure = trainer.train_step, training.matmul_peak
    trainer.train_step = lambda: (events.append('step'), step())[1]
    monkeypatch.setattr(training, 'matmul_peak', lambda *args: (events.append('peak'), measure(*args))[1])
    training._peak.cache_clear()
    before = torch.get_rng_state()
    trainer.fit(progress=False)
    assert events[:2] == ['peak', 'step'] and training._peak.cache_info().misses == 1, 'once, before it trains'
    training._peak.cache_clear()
    matmul_peak('cpu', 'bf16', 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_float32_matmul_precision('high')
    matmul_peak('cpu', 'bf16', 1)
    assert training._peak.cache_info().misses == 2, 'another precision of products, another peak'


# --- images for the decoder ---

class Pairs:
    "Digits, each of which is given out only while another is being read."
    def __init__(self, images): self.images, self.meet = images, threading.Barrier(2)

    def __len__(self): return len(self.images)

    def __getitem__(self, n):
        self.meet.wait(20)
        return self.images[n], 0


def test_images_are_decoded_side_by_side_and_stay_in_order(monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    images = digits_images('train')[0][:24]
    config = FinetuneConfig(batch_size=8, seed=3)
    plain, pairs = (decoder._Feed(x, config, slice(0, 8)) for x in (images, Pairs(images)))
    assert torch.equal(pairs.take(torch.tensor([5, 2, 9, 0])), images[[5, 2, 9, 0]])
    for step in (0, 1, 2, 7): assert torch.equal(pairs._read(step), plain._read(step))


# --- placements that are combined ---

COMBINED = {
    'ddp-compiled': dict(compile=True),
    'fsdp-bf16': dict(precision='bf16', parallel='fsdp'),
    'fsdp-bf16-compiled-recomputed': dict(precision='bf16', parallel='fsdp', compile=True, checkpointing=True),
}
compiler = pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))), reason='torch.compile needs a C++ compiler')


def fit(latents: Path, out: Path, **more) -> Trainer:
    trainer = Trainer(TrainConfig(steps=4, **SMALL | more), LatentDataset(latents, project=project), out)
    trainer.fit(progress=False)
    return trainer


@pytest.fixture(scope='module')
def combined(latents, tmp_path_factory):
    "What two processes made of every combination, beside what one makes without any."
    out = tmp_path_factory.mktemp('combined')
    torchrun = Path(sys.executable).parent/'torchrun'
    result = subprocess.run([torchrun, '--standalone', '--nproc_per_node', '2', __file__, latents, out], capture_output=True,
                            text=True, timeout=600, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr[-3000:]
    return out


@compiler
@pytest.mark.parametrize('name', COMBINED)
def test_combined_placements_train_as_the_plain_run(latents, combined, name):
    precision = COMBINED[name].get('precision', 'float32')
    plain = combined/f'plain-{precision}'
    if not plain.exists(): fit(latents, plain, precision=precision)
    assert len(losses(plain)) == 4 and losses(combined/name) == pytest.approx(losses(plain), rel=5e-5)


@compiler
def test_blocks_travel_in_bf16_and_weights_stay_in_float32(combined):
    seen = json.loads((combined/'dtypes.json').read_text())
    assert seen['fsdp-bf16'] == {'in a block': 'torch.bfloat16', 'outside': 'torch.float32', 'kept': ['torch.float32']}
    assert seen['ddp-compiled'] == {'in a block': 'torch.float32', 'outside': 'torch.float32', 'kept': ['torch.float32']}
    for file in checkpoints(combined/'fsdp-bf16')[-1].rglob('*.safetensors'):
        with safe_open(file, 'pt') as f: assert {f.get_slice(k).get_dtype() for k in f.keys()} == {'F32'}


@compiler
def test_compiled_and_recomputed_is_the_plain_run(latents, tmp_path, monkeypatch):
    monkeypatch.setitem(sit.SIZES, 'Ti', (64, 2, 2)) # what is compiled matters here, not how much of it
    for name, more in (('plain', {}), ('both', dict(compile=True, checkpointing=True))): fit(latents, tmp_path/name, **more)
    assert losses(tmp_path/'both') == pytest.approx(losses(tmp_path/'plain'), rel=5e-5)


def _dtypes(trainer: Trainer) -> dict:
    "In which precision a forward pass finds weights, and in which this process keeps its own."
    found, net = {}, trainer.net
    hooks = [net.blocks[0].attn.qkv.register_forward_hook(lambda m, *_: found.update({'in a block': str(m.weight.dtype)})),
             net.x_embedder.register_forward_hook(lambda m, *_: found.update({'outside': str(m.proj.weight.dtype)}))]
    z0, z1, t, y = trainer.draws(0)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=trainer.config.precision == 'bf16'): net(z1, t, y)
    for h in hooks: h.remove()
    state = [v for s in trainer.optimizer.state.values() for v in s.values()]
    return found | {'kept': sorted({str(v.dtype) for v in (*trainer.weights, *trainer.ema, *state)})}


if __name__ == '__main__':
    sit.SIZES['Ti'] = (64, 1, 2)
    place, out = map(Path, sys.argv[1:])
    seen = {}
    for name, more in COMBINED.items():
        trainer = fit(place, out/name, **more)
        if name != 'fsdp-bf16-compiled-recomputed': seen[name] = _dtypes(trainer)
    if trainer.accelerator.is_main_process: (out/'dtypes.json').write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


# --- order ---

@pytest.mark.parametrize('order, window, warned', [('sorted', 100, True), ('sorted', 1000, False), ('shuffled', 100, False), ('one class', 100, False)])
def test_latents_that_lie_in_order_of_class_are_noticed(order, window, warned):
    "Whoever has written them; where a window holds them all, order does not matter."
    y = torch.arange(1000)//100
    y = {'sorted': y, 'shuffled': y[torch.randperm(1000, generator=torch.Generator().manual_seed(0))], 'one class': 0*y}[order]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        lt.LatentLoader(type('Data', (), {'y': y, 'z': {}, '__len__': lambda self: 1000})(), 10, window=window)
    assert [('lie in order of their classes' in str(w.message) and f'from {window} of 1000' in str(w.message)) for w in heard] == [True]*warned


# --- memory that runs out is no damage ---

def _resume(latents, tmp_path):
    config, data = TrainConfig(steps=2, **SMALL), LatentDataset(latents, project=project)
    Trainer(config, data, tmp_path/'run').fit(until=1, progress=False)
    return training, 'load_file', lambda: Trainer(config, data, tmp_path/'run').fit(progress=False)


def _load(latents, tmp_path):
    Trainer(TrainConfig(steps=1, **SMALL), LatentDataset(latents, project=project), tmp_path/'run').fit(progress=False)
    return sit.SiT, 'from_pretrained', lambda: load_run(tmp_path/'run')


def _file(tmp_path):
    save_file({'a': torch.zeros(2)}, tmp_path/'a.safetensors')
    return tmp_path/'a.safetensors'


READERS = {
    'a run goes on': _resume,
    'a run is loaded': _load,
    'an autoencoder': lambda latents, tmp_path: (AutoencoderKL, 'from_pretrained', lambda: load_tokenizer('digits')),
    'weights that must fit': lambda latents, tmp_path: (torch.nn.Linear, 'load_state_dict', lambda: weights._fitting(torch.nn.Linear(1, 1), {}, 'x')),
    'a published SiT': lambda latents, tmp_path: (torch.nn.Module, 'load_state_dict', lambda: sit._load_published(torch.nn.Linear(1, 1), {})),
    'a file of tensors': lambda latents, tmp_path: (weights, '_read_tensors', lambda: weights.open_tensors(_file(tmp_path))),
    'an extractor': lambda latents, tmp_path: (timm, 'create_model', lambda: features._dinov2(_file(tmp_path))),
}


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB'), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
@pytest.mark.parametrize('name', READERS)
def test_memory_that_runs_out_is_no_damage(latents, tmp_path, monkeypatch, name, error):
    "Nobody is told to remove a checkpoint or to fetch a file again."
    where, what, work = READERS[name](latents, tmp_path)
    def fails(*args, **options): raise error
    monkeypatch.setattr(where, what, fails)
    words = 'out of memory at step 0: raise accumulate.*; checkpoints are untouched' if name == 'a run goes on' else None
    with pytest.raises(torch.OutOfMemoryError if words else type(error), match=words): work()


def test_the_speed_of_products_is_measured_in_what_memory_is_left(monkeypatch):
    "A run may need all the rest."
    sides = []
    def product(side, *rest):
        sides.append(side)
        if side > fits: raise torch.OutOfMemoryError('CUDA out of memory')
        return 1.
    monkeypatch.setattr(training, '_fastest_product', product)
    training._peak.cache_clear()
    fits = 3000
    assert matmul_peak('cuda', 'bf16') == 2*2048**3 and sides == [8192, 4096, 2048]
    fits = 0
    with pytest.raises(torch.OutOfMemoryError): matmul_peak('cpu')
    assert sides[3:] == [1024]
    training._peak.cache_clear()
