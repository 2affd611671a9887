"""On a GPU that is there: what the stand-in of test_devices shows, compared with a CPU, and what no stand-in can show.

Skipped without CUDA. SLFM_TEST_DEVICE=cpu rehearses it on a CPU, where most of it compares a thing with itself.
"""
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_devices import PATHS, PROBES, SAMPLERS, SPHERE, TOKENIZERS, T, Y, latent, network, small_kl, walk
from torch.utils._pytree import tree_leaves

from spherical_lfm import experiments, probes, sphere, training
from spherical_lfm.decoder import DecoderTrainer, FinetuneConfig, reconstruction_metrics
from spherical_lfm.engine import features, latents
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.processes import default_device
from spherical_lfm.fidelity import Pieces, generate
from spherical_lfm.paths import ARMS, SlerpPath, arm_path
from spherical_lfm.sampling import LoadedRun, Sampler, load_run, sample
from spherical_lfm.sit import SiT
from spherical_lfm.tokenizers import Tokenizer, load_tokenizer
from spherical_lfm.tools.pipeline import FlowScheduler, SphericalSiTPipeline
from spherical_lfm.training import TrainConfig, Trainer, flow_loss

GPU = torch.device(os.environ.get('SLFM_TEST_DEVICE', 'cuda'))
REAL = GPU.type == 'cuda'
if REAL and not torch.cuda.is_available(): pytest.skip('needs a CUDA device', allow_module_level=True)


@pytest.fixture(autouse=True)
def exact_float32():
    "No TF32, so that float32 on both sides means the same."
    with torch.backends.cudnn.flags(allow_tf32=False):
        torch.set_float32_matmul_precision('highest')
        yield


@contextmanager
def nobody_waits():
    "Raises if the host waits for the GPU."
    if not REAL:
        yield
        return
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')


def same(work, home=GPU.type, **near):
    "What `work(put)` gives on the CPU and on the GPU: the same numbers up to rounding, and everything where it belongs."
    near = near or dict(rtol=2e-4, atol=2e-5)
    here, there = work(lambda x: x), work(lambda x: x.to(GPU))
    for x, y in zip(tree_leaves(here), tree_leaves(there), strict=True):
        if not isinstance(x, torch.Tensor):
            assert x == (pytest.approx(y, rel=1e-3) if isinstance(y, float) else y)
            continue
        assert y.device.type == home and x.dtype == y.dtype
        torch.testing.assert_close(y.cpu(), x, **near)


@pytest.mark.parametrize('name', SPHERE)
def test_geometry(name): same(SPHERE[name], **(dict(rtol=.02, atol=.02) if 'half' in name else {}))


@pytest.mark.parametrize('name', PATHS)
def test_paths(name): same(lambda put: walk(PATHS[name], put))


@pytest.mark.parametrize('options', [{}, {'learn_sigma': True}, {'reverse_time': True}])
def test_the_network(options): same(lambda put: put(network(**options))(put(latent()), put(T), put(Y)))


@pytest.mark.parametrize('arm', ARMS)
@pytest.mark.parametrize('how', ['float32', 'bf16', 'compiled', 'data, compiled'])
def test_the_loss_and_its_gradient(arm, how):
    path = ARMS[arm].predicting('data' if 'data' in how else 'velocity')
    def work(put):
        ends = put(path.prior((3, 8, 4, 4), torch.Generator().manual_seed(1))), put(path.projection(latent()) if path.spherical else latent())
        net = put(network().requires_grad_(True))
        loss_fn = torch.compile(flow_loss, dynamic=False) if 'compiled' in how else flow_loss
        with torch.autocast(ends[0].device.type, torch.bfloat16, enabled=how == 'bf16'): loss, power = loss_fn(net, path, *ends, put(T), put(Y), arm == 'spherical-slerp')
        loss.mean().backward()
        return loss.detach(), power, [p.grad.norm() for p in net.parameters() if p.grad is not None]
    same(work, **(dict(rtol=.1, atol=.05) if how == 'bf16' else dict(rtol=2e-3, atol=1e-4)))


@pytest.mark.parametrize('arm,name', [('spherical-slerp', name) for name in SAMPLERS] + [('vanilla-shell', 'adams3'), ('spherical-linear', 'adaptive')])
def test_samples(arm, name):
    loose = name in ('bf16', 'adaptive') # the adaptive method may choose another step where rounding tips the balance
    same(lambda put: sample(put(network()), ARMS[arm], Y, SAMPLERS[name], batch_size=2), **(dict(rtol=.05, atol=.05) if loose else dict(rtol=2e-3, atol=2e-4)))


@pytest.mark.parametrize('name', [n for n in TOKENIZERS if n != 'posterior'])
def test_tokenizers(name):
    images = digits_images('test')[0][:4]
    def work(put):
        tokenizer = put(TOKENIZERS[name]())
        z = tokenizer.encode(put(images))
        return z, tokenizer.decode(z)
    same(work, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', PROBES)
def test_probes(name):
    images, labels = digits_images('test')
    with torch.no_grad(): z = load_tokenizer('digits').encode(images[:6])
    same(lambda put: PROBES[name](put(load_tokenizer('digits')), put(z), labels[:6] % 2, put), 'cpu', rtol=1e-3, atol=1e-3)


def test_geometry_of_a_comparison():
    images, labels = digits_images('test')
    def work(put): return experiments.geometry(put(load_tokenizer('digits')), images[:6], labels[:6] % 2)
    same(work, 'cpu', rtol=1e-3, atol=1e-3)


def test_generated_features(tmp_path):
    net = network_of_digits()
    images = digits_images('test')[0][:20]
    def work(put):
        tokenizer, run = put(load_tokenizer('digits', spherical=True)), LoadedRun(put(net), SlerpPath(), {'weights': 'w'})
        place = next(run.model.parameters()).device.type
        found = generate(tmp_path/place, run, tokenizer, torch.arange(6) % 10, 'digits', Sampler(2), pieces=Pieces(4, 2, 2, False))
        return found, reconstruction_metrics(tokenizer, images, features.feature_function('digits'))
    same(work, 'cpu', rtol=5e-3, atol=5e-3)


def network_of_digits() -> SiT:
    torch.manual_seed(0)
    net = SiT.from_name('SiT-Ti/2', input_size=4, in_channels=16, num_classes=10).requires_grad_(False)
    for p in net.parameters(): p += .05*torch.randn_like(p)
    return net


@pytest.mark.parametrize('method', ['euler', 'adams2'])
def test_pipeline(method):
    def work(put):
        pipe = SphericalSiTPipeline(put(network()), FlowScheduler('spherical-slerp', method), put(small_kl()))
        pipe.set_progress_bar_config(disable=True)
        return [pipe([0, 2], 1.5, 3, torch.Generator('cpu').manual_seed(0), output_type=kind).images for kind in ('latent', 'pt')]
    same(work, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not REAL, reason='an offload needs a GPU')
def test_pipeline_that_waits_on_the_host():
    "enable_model_cpu_offload: modules come to the GPU one after the other, and go back."
    pipe = SphericalSiTPipeline(network(), FlowScheduler('spherical-slerp'), small_kl())
    pipe.set_progress_bar_config(disable=True)
    call = dict(output_type='pt', num_inference_steps=3)
    alone = pipe([0, 2], generator=torch.Generator('cpu').manual_seed(0), **call).images
    pipe.enable_model_cpu_offload()
    there = pipe([0, 2], generator=torch.Generator('cpu').manual_seed(0), **call).images
    torch.testing.assert_close(there.cpu(), alone, rtol=2e-3, atol=2e-3)
    pipe.maybe_free_model_hooks()
    assert {p.device.type for m in (pipe.transformer, pipe.vae) for p in m.parameters()} == {'cpu'}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cuda')/'latents'
    latents.encode_latents(load_tokenizer('digits', device=default_device()), ImageSource('digits'), folder, latents.Encoding(shard_size=100), torch.arange(256), progress=False)
    return folder


def test_a_cache_is_the_one_that_a_cpu_encodes(tmp_path):
    "In float32: by default a GPU convolves in TF32, and latents are 0.01 apart."
    for place in ('cpu', GPU): latents.encode_latents(load_tokenizer('digits', device=place), ImageSource('digits'), tmp_path/str(place), latents.Encoding(shard_size=100), torch.arange(256), progress=False)
    here, there = (latents.LatentDataset(tmp_path/str(place)) for place in ('cpu', GPU))
    for a, b in zip(here.batch(torch.arange(256)), there.batch(torch.arange(256))): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


COMMON = dict(model='SiT-Ti/1', batch_size=32, steps=4, log_every=1, lr=1e-3, ema_decay=.9)
RUNS = {
    'plain': {},
    'linear': dict(arm='vanilla-linear'),
    'shell': dict(arm='vanilla-shell'),
    'TF32': dict(tf32=True),
    'bf16': dict(precision='bf16'),
    'compiled': dict(compile=True),
    'compiled bf16': dict(compile=True, precision='bf16'),
    'compiled, checkpointing': dict(compile=True, checkpointing=True),
    'checkpointing, in parts': dict(checkpointing=True, accumulate=2),
    'clipped, logit-normal': dict(max_grad_norm=.1, time_sampling='logit-normal', jacobi=True),
    'OT coupling': dict(coupling='transport'),
    'latents on the host': dict(resident='host'),
    'latents in files': dict(resident='no'),
}


def trained(config: TrainConfig, cache, out, cpu=False) -> list:
    "The losses of a run that draws its noise on the CPU, on either side."
    noise = training.matched_noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, 'matched_noise', lambda c, path, shape, step, device: noise(c, path, shape, step, 'cpu').to(device))
        if cpu: patch.setattr(training.Accelerator, 'device', torch.device('cpu'))
        trainer = Trainer(config, latents.LatentDataset(cache, project=arm_path(config.arm).projection), out)
        assert trainer.device.type == ('cpu' if cpu else GPU.type)
        trainer.fit(progress=False)
    return [(r['loss'], r['grad_norm']) for r in trainer.log()]


@pytest.mark.parametrize('name', RUNS)
def test_a_run_goes_as_on_a_cpu(cache, tmp_path, name):
    "Four steps with the same noise: losses and gradients."
    settings = COMMON | dict(tf32=False) | RUNS[name]
    there = trained(TrainConfig(**settings), cache, tmp_path/'gpu')
    plain = {k: v for k, v in settings.items() if k not in ('precision', 'compile', 'checkpointing', 'resident', 'tf32')}
    here = trained(TrainConfig(**plain), cache, tmp_path/'cpu', cpu=True)
    exact = settings.get('precision') != 'bf16' and not settings['tf32']
    for (a, g), (b, h) in zip(there, here, strict=True): assert a == pytest.approx(b, rel=1e-3 if exact else .02) and g == pytest.approx(h, rel=5e-3 if exact else .1)


def test_a_run_goes_on(cache, tmp_path):
    "Stopped after two steps and continued: as if it had never stopped, up to the order in which a GPU adds."
    config = TrainConfig(**COMMON, tf32=False)
    data = latents.LatentDataset(cache, project=sphere.project)
    whole, first = Trainer(config, data, tmp_path/'whole'), Trainer(config, data, tmp_path/'parts')
    whole.fit(progress=False)
    first.fit(until=2, progress=False)
    Trainer(config, data, tmp_path/'parts').fit(progress=False)
    a, b = (load_run(tmp_path/name).model.state_dict() for name in ('whole', 'parts'))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('resident', ['gpu', 'host', 'no'])
@pytest.mark.parametrize('compiled', [False, True])
def test_nobody_waits_during_a_step(cache, tmp_path, resident, compiled):
    if not REAL and resident == 'gpu': pytest.skip('needs a GPU')
    config = TrainConfig(**COMMON, resident=resident, compile=compiled, precision='bf16', max_grad_norm=1.)
    trainer = Trainer(config, latents.LatentDataset(cache, project=sphere.project), tmp_path)
    for _ in range(2): # compiles, and makes the optimiser's state
        trainer.train_step()
        trainer.step += 1
    with nobody_waits(): trainer.train_step()
    if resident == 'gpu' and REAL: assert trainer.data.z['z'].device.type == 'cuda'


@pytest.mark.skipif(not REAL, reason='the memory of a GPU')
def test_memory_that_runs_out(cache, tmp_path):
    "The sentence of the trainer, and what was saved."
    config = TrainConfig(**COMMON | dict(steps=2, model='SiT-S/1'))
    data = latents.LatentDataset(cache, project=sphere.project)
    Trainer(config, data, tmp_path).fit(until=1, progress=False)
    trainer = Trainer(TrainConfig(**COMMON | dict(steps=2, model='SiT-S/1')), data, tmp_path)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    taken = torch.empty(max(0, free - 2**28), dtype=torch.uint8, device='cuda')
    with pytest.raises(torch.OutOfMemoryError, match=r'out of memory at step \d: raise accumulate'):
        trainer.fit(progress=False)
    del taken
    torch.cuda.empty_cache()
    assert load_run(tmp_path).record['step'] == 1


def test_a_decoder_is_finetuned(tmp_path):
    source = ImageSource('digits')
    config = FinetuneConfig(steps=3, batch_size=4, perceptual='none', discriminator_start=1, log_every=1)
    trainer = DecoderTrainer(load_tokenizer('digits', spherical=True), source, config, tmp_path/'d')
    trainer.fit(progress=False)
    assert trainer.accelerator.device.type == GPU.type and all(torch.isfinite(torch.tensor(r['loss'])) for r in trainer.log())


def test_a_comparison_end_to_end(tmp_path):
    digits = experiments.PRESETS['digits']
    preset = replace(digits, samples=64, curve_samples=32, sampler=Sampler(3, precision='bf16'), train=digits.train | dict(steps=4, checkpoint_every=2, log_every=1, precision='bf16', compile=REAL))
    report = experiments.compare(preset, ('vanilla-linear', 'spherical-slerp'), tmp_path, progress=False)
    assert all(row['fd'] > 0 and row['steps'] == 4 for row in report['arms'].values()) and (tmp_path/'report.html').exists()


def test_partners_of_labels_on_the_gpu():
    y = torch.arange(12) % 3
    same(lambda put: probes.find_partners(put(y), torch.Generator('cpu').manual_seed(0)), 'cpu')


def test_a_posterior_is_drawn_on_the_gpu():
    tokenizer = Tokenizer(small_kl()).requires_grad_(False).to(GPU)
    z = [tokenizer.encode(digits_images('test')[0][:4], torch.Generator(GPU).manual_seed(1)) for _ in range(2)]
    assert z[0].device.type == GPU.type and torch.equal(*z)
