"""On a GPU that is not there: tensors that say they lie on cuda:0, and four processes that each have a device of their own."""
import copy
import json
import os
import shutil
import socket
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL
from exact import blocks, noise
from forked import SERVER
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from spherical_lfm import concentration, experiments, probes, sphere, training
from spherical_lfm.decoder import reconstruction_metrics
from spherical_lfm.engine import features, latents, runs
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.processes import default_device, processes
from spherical_lfm.fidelity import METRICS, Pieces, generate, score_features
from spherical_lfm.paths import ARMS, SlerpPath, arm_path
from spherical_lfm.sampling import LoadedRun, Sampler, guided_velocity, load_run, sample, tokenizer_for
from spherical_lfm.sit import SiT
from spherical_lfm.solvers import METHODS
from spherical_lfm.tokenizers import LatentTransform, Tokenizer, load_tokenizer, measure_statistics, standardise
from spherical_lfm.tools import cli, studies
from spherical_lfm.tools.pipeline import FlowScheduler, SphericalSiTPipeline
from spherical_lfm.tools.studies import TokenStatistics
from spherical_lfm.training import TrainConfig, Trainer, flow_loss

CUDA, aten = torch.device('cuda', 0), torch.ops.aten
COPIES = aten._to_copy.default, aten.copy_.default
INDEXING = aten.index.Tensor, aten.index_put.default, aten.index_put_.default
#: What makes the host wait until the GPU has come to it: numbers that are read, and sizes that depend on numbers.
READING = aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor


class OnGpu(torch.Tensor):
    "A tensor that says it lies on a GPU. Its numbers are `held` on the CPU; like a real one it gives no array."
    def __new__(cls, held, device=CUDA):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device)

    def __init__(self, held, device=CUDA): self.held = held
    def tolist(self): return self.cpu().tolist()
    def new_tensor(self, numbers): return torch.tensor(numbers, dtype=self.dtype, device=self.device)
    def __repr__(self, **how): return f'OnGpu({list(self.shape)}, {self.dtype})'
    __torch_dispatch__ = classmethod(lambda cls, func, *rest: pytest.fail(f'{func} outside of the machine'))


class Generator(torch.Generator):
    "A generator that says where it draws, and draws on the CPU."
    def __new__(cls, device='cpu'):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made
    device = property(lambda self: self.place)


def place_of(x): return x.device if isinstance(x, OnGpu) else torch.device('cpu')


class Machine(TorchDispatchMode):
    """Computes what is asked of `OnGpu` tensors, and refuses what GPUs would refuse.

    Counts by function of the package how often the host would wait, and notes what came to which GPU.
    """
    def __init__(self):
        super().__init__()
        self.done, self.waits, self.arrivals = 0, Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        mine, wanted = [x for x in tensors if isinstance(x, OnGpu)], kwargs.get('device') and torch.device(kwargs['device'])
        if not mine and (wanted is None or wanted.type != 'cuda'): return func(*args, **kwargs)
        goes = wanted or mine[0].device
        if goes.type == 'cuda': goes = torch.device('cuda', goes.index or 0) # 'cuda' is the current one, 0 unless somebody sets it
        self.done += 1
        self._refuse_mixture(func, args, tensors if mine else [])
        if self._makes_wait(func, args, goes) and (who := _asked_by()): self.waits[who] += 1 # what the test itself puts there does not count
        if not mine: self.arrivals.append([goes.index, bool(PartialState._shared_state), _asked_by()])
        given, named = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
        if wanted is not None: named['device'] = 'cpu'
        out = func(*given, **named)
        if func is aten.copy_.default: return args[0]
        if goes.type == 'cpu': return out.clone() # to the host: a copy, whatever `out` is
        known = {id(x.held): x for x in mine if x.device == goes} # what was changed in place stays the tensor that it was
        return tree_map(lambda x: known.get(id(x)) if id(x) in known else OnGpu(x, goes) if isinstance(x, torch.Tensor) else x, out)

    def _refuse_mixture(self, func, args, tensors):
        "Scalars of the CPU go into elementwise kernels, indices of the CPU are copied; nothing else may be elsewhere."
        if func in COPIES: return
        if func in INDEXING: tensors = [args[0], *(x for x in args[2:] if isinstance(x, torch.Tensor) and (x.ndim or isinstance(x, OnGpu)))]
        elif torch.Tag.pointwise in func.tags: tensors = [x for x in tensors if x.ndim or isinstance(x, OnGpu)]
        places = {str(place_of(x)) for x in tensors}
        if len(places) > 1: raise RuntimeError(f'{func}: tensors on {sorted(places)}, asked by {_asked_by()}')

    def _makes_wait(self, func, args, goes):
        if func in READING: return True
        if func in INDEXING: return any(i.dtype in (torch.bool, torch.uint8) or not isinstance(i, OnGpu) for i in args[1] if i is not None)
        if func is aten.where.self: return any(not isinstance(x, OnGpu) for x in args)
        if func is aten.copy_.default: return place_of(args[0]) != place_of(args[1])
        if func is not aten._to_copy.default or goes == place_of(args[0]): return False
        return not getattr(args[0], 'is_pinned_here', False) # pageable memory, or on the way to the host

def _asked_by() -> str | None:
    "The innermost function of the package, as module.function; None if the test asks."
    frame = sys._getframe(2)
    while frame and (frame.f_code.co_name[0] == '<' or not frame.f_globals.get('__name__', '').startswith('spherical_lfm')): frame = frame.f_back
    return f'{frame.f_globals["__name__"].rpartition(".")[2]}.{frame.f_code.co_name}' if frame else None


def _pinned(x):
    "A copy in what stands for pinned memory; also in threads, which know nothing of the machine."
    found = x.clone()
    found.is_pinned_here = True
    return found


def _made_here(make):
    "What makes a tensor of numbers: on the host, then brought to where it is wanted, which is what torch does."
    def made(*args, device=None, **how):
        found = make(*args, **how)
        return found if device is None else found.to(device)
    return made


@contextmanager
def gpus():
    "A machine with GPUs, as far as torch and this package can tell."
    torch._C._ensureCUDADeviceGuardSet() # as FakeTensorMode does: without a driver a guard that does nothing
    answers = {(torch.cuda, '_lazy_init'): None, (torch.cuda, 'is_bf16_supported'): True, (torch.cuda.amp.common, 'amp_definitely_not_available'): False,
               (torch.cuda, 'mem_get_info'): (2**35, 2**36), (torch.cuda, 'memory_reserved'): 0, (torch.cuda, 'memory_allocated'): 0}
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=False): # whose kernels have no counterpart on a CPU
        for (module, name), answer in answers.items(): patch.setattr(module, name, lambda *_, answer=answer, **__: answer)
        for name in ('tensor', 'as_tensor'): patch.setattr(torch, name, _made_here(getattr(torch, name)))
        patch.setattr(torch, 'Generator', Generator)
        patch.setattr(torch.Tensor, 'pin_memory', _pinned)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try: yield Machine()
        finally: torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.fixture
def machine():
    with gpus() as machine: yield machine


def both(machine, work):
    "What `work(put)` gives on the CPU and on the GPU; `put` brings tensors and modules there."
    here = work(lambda x: x)
    with machine: there = work(lambda x: x.to(CUDA))
    return here, there


def compare(here, there, home=CUDA, exact=True):
    "The same numbers, everything where it belongs."
    a, b = tree_leaves(here), tree_leaves(there)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        if not isinstance(x, torch.Tensor):
            assert x == y if exact or not isinstance(x, float) else x == pytest.approx(y, rel=1e-5)
            continue
        assert y.device == torch.device(home) and isinstance(y, OnGpu) == (y.device.type == 'cuda')
        y = y.held if isinstance(y, OnGpu) else y
        assert x.dtype == y.dtype
        if exact: assert torch.equal(x, y)
        else: torch.testing.assert_close(x, y)


def tokens(seed=0, count=3):
    "Tokens of eight channels, one of them zero."
    z = noise(count, 8, 2, 2, seed=seed)
    z[0, :, 0, 0] = 0
    return z


def pair():
    "Noise and data on the sphere; the first token of the first is antipodal, the second has not moved."
    a, b = sphere.project(tokens(0)), sphere.project(tokens(1))
    b[0, :, 0, 0], b[0, :, 0, 1] = -a[0, :, 0, 0], a[0, :, 0, 1]
    return a, b


T = torch.tensor([0., .3, 1.])
Y = torch.tensor([0, 2, 1])

SPHERE = {
    'project': lambda put: sphere.project(put(tokens())),
    'project along another axis': lambda put: sphere.project(put(tokens()), 2., -1),
    'project half precision': lambda put: sphere.project(put(tokens().bfloat16())),
    'tangent': lambda put: sphere.tangent(put(tokens()), put(tokens(1))),
    'angle': lambda put: sphere.angle(*map(put, pair())),
    'geodesic': lambda put: sphere.geodesic(*map(put, pair()), put(T)),
    'geodesic to a number': lambda put: sphere.geodesic(*map(put, pair()), .25),
    'slerp and its velocity': lambda put: (sphere.slerp(*map(put, pair()), put(T)), sphere.slerp_velocity(*map(put, pair()), put(T))),
    'exp_map': lambda put: sphere.exp_map(*map(put, pair())),
    'log_map': lambda put: sphere.log_map(*map(put, pair())),
    'transport': lambda put: sphere.transport(*map(put, pair()), put(tokens(2))),
    'dexp_inverse': lambda put: sphere.dexp_inverse(put(tokens()), put(.1*tokens(1)), put(tokens(2))),
    'sample_sphere': lambda put: put(sphere.sample_sphere((3, 8, 2, 2), generator=torch.Generator().manual_seed(1))),
    'token_norm': lambda put: concentration.token_norm(put(tokens())),
    'linear_radial_share': lambda put: concentration.linear_radial_share(put(T)),
    'pair_profile': lambda put: concentration.pair_profile(*(put(noise(5, seed=n).abs()) for n in range(3)), T, 8),
}


@pytest.mark.parametrize('name', SPHERE)
def test_geometry_stays_on_the_gpu_and_nobody_waits(machine, name):
    compare(*both(machine, SPHERE[name]))
    allowed = {'concentration.pair_profile'} if name == 'pair_profile' else set()
    assert set(machine.waits) <= allowed
    assert machine.done


PATHS = {**ARMS, **{f'{arm}, data': path.predicting('data') for arm, path in ARMS.items()}, 'ablation: all of the velocity': SlerpPath(project_velocity=False), 'straight steps': SlerpPath(exponential=False)}


def walk(path, put):
    "All that a path can do."
    z0, z1 = (put(x) for x in (pair() if path.spherical else (tokens(), tokens(1))))
    z, v = path.interpolate(z0, z1, put(T))
    per_sample = put(torch.tensor([.1, .2, .3])).view(-1, 1, 1, 1)
    return z, v, path.tangent(z, v), path.step(z, v, .1), path.step(z, v, per_sample), path.transport(z, z1, v), path.dexp_inverse(z, .1*v, v), path.velocity(z, put(T), v)


@pytest.mark.parametrize('name', PATHS)
def test_paths_stay_on_the_gpu_and_nobody_waits(machine, name):
    compare(*both(machine, lambda put: walk(PATHS[name], put)))
    assert machine.done and not machine.waits


@pytest.mark.parametrize('arm', ARMS)
def test_noise_is_drawn_where_it_is_wanted(machine, arm):
    where = {'cpu': 'cpu', 'cuda': CUDA}
    def draw(device): return ARMS[arm].prior((2, 8, 2, 2), torch.Generator(device).manual_seed(3), device), sphere.sample_sphere((2, 8, 2, 2), generator=torch.Generator(device).manual_seed(4), device=device)
    here = draw(where['cpu'])
    with machine: there = draw(where['cuda'])
    compare(here, there)
    assert not machine.waits


def summaries(put):
    a, b = map(put, pair())
    along = concentration.path_norms(ARMS['spherical-slerp'].interpolate, a, b, torch.linspace(0, 1, 3))
    return along, concentration.norm_stats(a), concentration.radial_share(a, b), concentration.off_shell_distance(along['mean'], ((1., .1), (2., .2)))


def test_summaries_of_norms_come_to_the_host(machine):
    compare(*both(machine, summaries), home='cpu')
    assert set(machine.waits) <= {'concentration.path_norms', 'concentration.norm_stats', 'concentration.radial_share', 'concentration.off_shell_distance'}


def network(**more):
    "A small network whose output is not zero."
    torch.manual_seed(0)
    net = SiT(input_size=4, patch_size=2, in_channels=8, hidden_size=16, depth=2, num_heads=2, num_classes=3, **more).eval().requires_grad_(False)
    for p in net.parameters(): p += .1*noise(*p.shape, seed=p.numel())
    return net


def latent(seed=0, count=3): return noise(count, 8, 4, 4, seed=seed)


@pytest.mark.parametrize('options', [{}, {'learn_sigma': True}, {'reverse_time': True}])
def test_the_network_stays_on_the_gpu(machine, options):
    def work(put): return put(network(**options))(put(latent()), put(T), put(Y))
    compare(*both(machine, work), exact=False)
    assert machine.done and not machine.waits


@pytest.mark.parametrize('arm', ARMS)
@pytest.mark.parametrize('bf16, prediction', [(False, 'velocity'), (True, 'velocity'), (False, 'data')])
def test_the_loss_of_a_training_step(machine, arm, bf16, prediction):
    "Also under autocast, where the loss stays float32."
    path = ARMS[arm].predicting(prediction)
    def work(put):
        ends = (put(path.prior((3, 8, 4, 4), torch.Generator().manual_seed(1))), put(path.projection(latent()) if path.spherical else latent()))
        net, jacobi = put(network().requires_grad_(True)), arm == 'spherical-slerp'
        with torch.autocast(ends[0].device.type, torch.bfloat16, enabled=bf16): return flow_loss(net, path, *ends, put(T), put(Y), jacobi)
    here, there = both(machine, work)
    if bf16: assert {x.dtype for x in there} == {torch.float32} and [x.held.tolist() for x in there] == [pytest.approx(x.tolist(), rel=.05) for x in here]
    else: compare(here, there, exact=False)
    assert all(x.requires_grad == (k == 0) for k, x in enumerate(there)) and not machine.waits


SAMPLERS = {
    'plain': Sampler(3),
    'guidance': Sampler(3, guidance=2.),
    'interval': Sampler(3, guidance=1.5, interval=(.2, .8)),
    'negative class': Sampler(3, guidance=2., negative=1),
    'shift': Sampler(3, shift=3.),
    'bf16': Sampler(3, precision='bf16'),
    'speed': Sampler(3, speed=(1.5, 1.2)),
    **{method: Sampler(3, method, guidance=1.5) for method in METHODS},
    'adaptive': Sampler(method='adaptive', guidance=2., interval=(.2, .8), tolerance=.1),
}


@pytest.mark.parametrize('arm,name', [('spherical-slerp', name) for name in SAMPLERS] + [('vanilla-shell', 'adams3'), ('spherical-linear', 'adaptive')])
def test_samples_are_made_on_the_gpu(machine, arm, name):
    "Every solver and every way of guidance, two batches; only the adaptive method asks the GPU how it goes."
    sampler = SAMPLERS[name]
    def work(put): return sample(put(network(flow_map=name == 'flow_map')), ARMS[arm], Y, sampler, batch_size=2)
    here, there = both(machine, work)
    compare(here, there, exact=False) if name != 'bf16' else torch.testing.assert_close(there.held, here, rtol=.05, atol=.05)
    allowed = {'sampling.sample': 2, 'sampling.velocity_field': 3*(1 + (name == 'speed'))} # noise of a batch, labels of a batch and of all; factors go with labels, not with steps
    inside = {'solvers.adaptive', 'solvers._error_size'} if name == 'adaptive' else set()
    assert {k: n for k, n in machine.waits.items() if k not in inside} == allowed and inside <= set(machine.waits)


def test_velocities_at_times_of_their_own(machine):
    "Of a number, of one time for all, and of one per sample; the last two are not brought to the host for the network."
    sampler = Sampler(2, guidance=2., interval=(.2, .8))
    def work(put):
        net, z = put(network()), put(sphere.project(latent()))
        return [guided_velocity(net, ARMS['spherical-slerp'], z, t, put(Y), sampler, 3) for t in (.5, put(T))]
    compare(*both(machine, work), exact=False)
    assert not machine.waits


def test_given_noise_is_checked_before_it_moves(machine):
    def work(put): return sample(put(network()), ARMS['vanilla-linear'], put(Y), Sampler(2), noise=put(latent()))
    compare(*both(machine, work), exact=False)
    assert set(machine.waits) == {'checks.check_tokens', 'sampling.check_classes'}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "Latents of digits, two channels of which are enough to see."
    folder = tmp_path_factory.mktemp('devices')/'latents'
    latents.encode_latents(blocks(std=[.5]*12, mean=[0.]*12), ImageSource('digits'), folder, latents.Encoding(shard_size=40, batch_size=40), torch.arange(80), progress=False)
    return folder


@pytest.mark.parametrize('arm', ['vanilla-linear', 'spherical-slerp'])
def test_latents_that_live_on_the_gpu(machine, cache, arm):
    def work(put):
        data = put(latents.LatentDataset(cache, project=arm_path(arm).projection, resident=True))
        machine.waits.clear() # of the move
        return data.batch(torch.tensor([3, 70, 12]), torch.tensor([True, False, True]))
    compare(*both(machine, work))
    assert not machine.waits


@pytest.mark.parametrize('resident', [True, False])
def test_latents_that_come_from_the_host(machine, cache, resident):
    "Pinned, and sent while the GPU works."
    data = latents.LatentDataset(cache, resident=resident)
    here = latents.LatentLoader(data, 8)(3)
    with machine: there = latents.LatentLoader(data, 8, device=CUDA)(3)
    compare(here, there)
    assert not machine.waits


STEPS = {
    'shell': TrainConfig('vanilla-shell', 'SiT-Ti/2', batch_size=4),
    'slerp': TrainConfig('spherical-slerp', 'SiT-Ti/2', batch_size=4, jacobi=True, precision='bf16', max_grad_norm=1.),
    'OT coupling': TrainConfig('spherical-linear', 'SiT-Ti/2', batch_size=4, coupling='transport', time_sampling='logit-normal', time_shift=2.),
}


@pytest.mark.parametrize('name', STEPS)
def test_a_training_step_never_waits(machine, monkeypatch, cache, tmp_path, name):
    "From the draws to the averaged weights, but for the backward pass, which torch does not begin without a GPU. Only OT coupling solves its assignment on the host."
    config = STEPS[name]
    monkeypatch.setattr(Accelerator, 'device', CUDA)
    with machine:
        trainer = Trainer(config, latents.LatentDataset(cache, project=arm_path(config.arm).projection), tmp_path/'run')
        machine.waits.clear()
        drawn = trainer.draws(0)
        with torch.autocast('cuda', torch.bfloat16, enabled=config.precision == 'bf16'): found = trainer.loss_fn(trainer.model, trainer.path, *drawn, config.jacobi)
        for p in trainer.parameters: p.grad = torch.ones_like(p)
        norm = trainer._apply_gradients()
        rows = drawn, found, norm, training.by_quarter(found[0].detach(), drawn[2]), trainer.ema, trainer.weights
    assert {x.device for x in tree_leaves(rows)} == {CUDA} and found[0].dtype == torch.float32
    assert set(machine.waits) == ({'training.ot_coupling'} if name == 'OT coupling' else set())
    count = sum(p.numel() for p in trainer.parameters)
    with machine: assert norm.item() == pytest.approx(count**.5, rel=1e-5)
    monkeypatch.undo()
    alone = Trainer(config, latents.LatentDataset(cache, project=arm_path(config.arm).projection), tmp_path/'alone').draws(0)
    for x, y in zip(alone, drawn): assert torch.equal(x, y.held)


def small_kl():
    "A small autoencoder of diffusers with attention."
    torch.manual_seed(0)
    return AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, block_out_channels=(8, 16), layers_per_block=1, latent_channels=8, norm_num_groups=4)


TOKENIZERS = {
    'digits': lambda: load_tokenizer('digits', spherical=True),
    'diffusers': lambda: Tokenizer(small_kl(), LatentTransform(scale=.5, shift=.1)).requires_grad_(False),
    'packed': lambda: Tokenizer(small_kl(), LatentTransform(pack=2, mean=[.1]*32, std=[2.]*32, unpack=True), True).requires_grad_(False),
    'posterior': lambda: Tokenizer(small_kl()).requires_grad_(False),
}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_tokenizers_encode_and_decode_on_their_gpu(machine, name):
    "Images may come from anywhere. The two checks of what goes in and what comes out are the only places where the host waits."
    images = digits_images('test')[0][:4]
    def work(put):
        tokenizer = put(TOKENIZERS[name]())
        z = tokenizer.encode(images, torch.Generator().manual_seed(1) if name == 'posterior' and put(T) is T else None)
        return z, tokenizer.encode(put(images)), tokenizer.decode(z)
    here, there = both(machine, work)
    if name == 'posterior': here, there = here[1:2], there[1:2]
    compare(here, there, exact=False)
    spherical = name in ('digits', 'packed')
    assert machine.waits == {'tokenizers._in_pieces': 1, 'tokenizers.raw_latents': 1, 'checks.check_tokens': 5 if spherical else 3}


def test_statistics_are_measured_on_the_gpu(machine):
    images = digits_images('test')[0][:8]
    def work(put):
        tokenizer = put(Tokenizer(small_kl()).requires_grad_(False))
        moments = measure_statistics(tokenizer, images.split(4), 2)
        return standardise(tokenizer, moments, 2).encode(images), moments.mean.tolist()
    compare(*both(machine, work), exact=False)


@pytest.fixture
def digit_latents():
    images, labels = digits_images('test')
    with torch.no_grad(): return load_tokenizer('digits').encode(images[:6]), labels[:6] % 2


PROBES = {
    'swaps': lambda t, z, y, put: probes.probe_swaps(t, z, *probes.find_partners(y, torch.Generator('cpu').manual_seed(0)), batch_size=4),
    'partners': lambda t, z, y, put: [probes.find_partners(put(y), torch.Generator('cpu').manual_seed(0), kind) for kind in ('class', 'any')],
    'displacement': lambda t, z, y, put: probes.swap_displacement(z, *probes.find_partners(y, torch.Generator('cpu').manual_seed(0))),
    'sensitivity': lambda t, z, y, put: probes.sensitivity(t, z, scales=(.5, 2.), angles=(.1, .5), batch_size=4),
    'response': lambda t, z, y, put: probes.radius_response(t, z, 2, batch_size=4),
    'statistics': lambda t, z, y, put: TokenStatistics(16, torch.linspace(0, 1, 3)).update(z).summary(),
}


@pytest.mark.parametrize('where', ['latents on the host', 'latents on the GPU'])
@pytest.mark.parametrize('name', PROBES)
def test_probes_hand_over_numbers_of_the_host(machine, digit_latents, name, where):
    z, y = digit_latents
    def work(put):
        return PROBES[name](put(load_tokenizer('digits')), z if where.endswith('host') else put(z), y, put)
    here, there = both(machine, work)
    compare(here, there, 'cpu', exact=False)


def test_the_geometry_of_a_comparison_is_numbers_of_the_host(machine, digit_latents):
    def work(put): return experiments.geometry(put(load_tokenizer('digits')), digits_images('test')[0][:6], digit_latents[1])
    compare(*both(machine, work), 'cpu', exact=False)


def test_distances_of_images(machine):
    from spherical_lfm.engine.features import feature_distance, pixel_distance, psnr, ssim
    a, b = (noise(3, 3, 16, 16, seed=n).tanh() for n in range(2))
    def work(put): return [d(put(a), put(b)) for d in (pixel_distance, psnr, ssim, feature_distance(lambda x: x.flatten(1)))]
    compare(*both(machine, work), exact=False)
    assert not machine.waits


@pytest.fixture
def lite(monkeypatch):
    "EfficientNet-Lite0 with random weights, on this process's device where one is asked for."
    import timm
    def made():
        torch.manual_seed(0)
        return timm.create_model('tf_efficientnet_lite0', pretrained=False).eval().requires_grad_(False)
    monkeypatch.setattr(features, 'efficientnet_lite0', made)


@pytest.mark.parametrize('extractor', ['digits', 'efficientnet'])
def test_extractors_work_on_the_device_of_their_process(machine, monkeypatch, lite, extractor):
    "Their features come to the host, where they are scored."
    images, parts = digits_images('test')[0][:2], features.all_parts(extractor)
    here = features.feature_function(extractor, parts)(images)
    monkeypatch.setattr(features, 'default_device', lambda: CUDA)
    with machine:
        extract = features.feature_function(extractor, parts)
        machine.waits.clear()
        there = extract(images), extract(images.to(CUDA))
    for found in there: compare(here, found, 'cpu', exact=False)
    assert machine.waits == {'features.extract': 2*len(parts) + 1} # features to the host, images from it


def test_semantic_features_follow_their_images(machine, lite):
    x = digits_images('test')[0][:2]
    def work(put): return features.semantic_features('efficientnet')(put(x)), features.efficientnet_distance()(put(x), put(x.flip(0)))
    compare(*both(machine, work), exact=False)


def test_scores_are_computed_on_the_host(machine):
    "On purpose, in float64; the distance alone also takes features from a GPU."
    a, b = ({'features': noise(40, 6, seed=n), 'logits': noise(40, 3, seed=n + 2)} for n in range(2))
    here = score_features(a, b, METRICS, extractor='digits')
    with machine:
        assert score_features(a, b, METRICS, extractor='digits') == here
        assert not machine.done
        assert features.frechet_distance(a['features'].to(CUDA), b['features'].to(CUDA)) == pytest.approx(here['fd'], rel=1e-9)


def test_generate_and_reconstructions(machine, monkeypatch, tmp_path):
    "Model, decoder and extractor on the GPU; features on the host."
    torch.manual_seed(0)
    net = SiT.from_name('SiT-Ti/2', input_size=4, in_channels=16, num_classes=10).requires_grad_(False)
    for p in net.parameters(): p += .05*noise(*p.shape, seed=1)
    images = digits_images('test')[0][:20]
    def work(put):
        tokenizer, run = put(load_tokenizer('digits', spherical=True)), LoadedRun(put(copy.deepcopy(net)), SlerpPath(), {'weights': 'w'})
        found = generate(tmp_path/type(put(T)).__name__, run, tokenizer, torch.arange(6) % 10, 'digits', Sampler(2), pieces=Pieces(4, 2, 2, False))
        return found, reconstruction_metrics(tokenizer, images, features.feature_function('digits'))
    here = work(lambda x: x)
    monkeypatch.setattr(features, 'default_device', lambda: CUDA)
    with machine: there = work(lambda x: x.to(CUDA))
    compare(here, there, 'cpu', exact=False)


@pytest.mark.parametrize('method', ['euler', 'adams2'])
def test_scheduler_and_pipeline(machine, method):
    def work(put):
        net, pipes = put(network()), []
        for kind in ('latent', 'pt'):
            pipe = SphericalSiTPipeline(net, FlowScheduler('spherical-slerp', method), put(small_kl()))
            pipe.set_progress_bar_config(disable=True)
            pipes.append(pipe([0, 2], 1.5, 3, torch.Generator('cpu').manual_seed(0), output_type=kind).images)
        scheduler = FlowScheduler('spherical-linear', method)
        scheduler.set_timesteps(3, pipes[0].device)
        return pipes, scheduler.timesteps, scheduler.add_noise(pipes[0], pipes[0].flip(0), scheduler.timesteps[:2]), scheduler.step(pipes[0], scheduler.timesteps[0], pipes[0].flip(0)).prev_sample
    compare(*both(machine, work), exact=False)


# --- four processes, each with a GPU of its own ---

WORLD, ARM = 4, 'spherical-slerp'
DIGITS = experiments.PRESETS['digits']
TINY = replace(DIGITS, samples=24, curve_samples=16, sampler=Sampler(2), metrics=('fid',), train=DIGITS.train | dict(model='SiT-Ti/2', steps=2, checkpoint_every=1, log_every=1, batch_size=8))


class FinishedRun:
    "What `run_arm` needs of a trainer whose run is finished: a backward pass needs a GPU that is there."
    def __init__(self, config, data, out): self.config, self.data, self.out, self.path = config, data, out, arm_path(config.arm)
    def fit(self, **options): return {'step': self.config.steps, 'stopped': False, 'final_loss': 0., 'seconds': 0.}
    def log(self): return []


def compared(out: Path, trainer=Trainer) -> dict:
    "The row of the arm in a comparison without its report."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, 'Trainer', trainer)
        patch.setattr(experiments, '_write_report', lambda preset, rows, *rest: rows)
        return experiments.compare(TINY, (ARM,), out, progress=False)


def drawn(run: Path, out: Path) -> dict:
    "Features of samples of a run, in pieces of which every process has one or two."
    loaded = load_run(run, None, default_device())
    return generate(out, loaded, tokenizer_for(loaded.record, device=default_device()), torch.arange(24) % 10, 'digits', Sampler(2), pieces=Pieces(4, progress=False))


def kept_is_decided_once(out: Path) -> list:
    "Processes that see other files than the main one do as it does; otherwise they would wait for each other for ever."
    encoded, exists, main = [], Path.exists, processes().is_main_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, 'encode_latents', lambda *_, **__: encoded.append('again'))
        if not main: patch.setattr(experiments, '_cached_in', lambda folder: None)
        experiments.prepare_latents(TINY, ImageSource('digits'), out/'compared'/'latents', False)
        if not main: patch.setattr(Path, 'exists', lambda path: path.name == 'start' or exists(path))
        start = studies.starting_tokenizer('digits', ImageSource('digits'), out/'study', 'a probe', mode='measure', limit=64, progress=False)
    return [encoded, start.latent_identity]


def one_of_four(rank: int, port: int, out: Path):
    "What one process does, on a device that is its own once the process group is known, and what it leaves behind."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD), MASTER_ADDR='localhost', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    begin = PartialState.__init__

    def begin_with_own_device(self, *args, **options):
        begin(self, *args, **options)
        self.device = torch.device('cuda', rank)
    PartialState.__init__ = begin_with_own_device
    with gpus() as machine, machine:
        cli.slfm_encode(['digits', 'digits', str(out/'encoded'), '--size', '16', '--shard_size', '400', '--no_flip'])
        row = compared(out/'compared', FinishedRun)
        found = drawn(out/'compared'/ARM, out/'drawn')
        kept = kept_is_decided_once(out)
    found = {k: v.tolist() for k, v in found.items()}
    (out/f'rank-{rank}.json').write_text(json.dumps({'arrivals': machine.arrivals, 'row': row, 'drawn': found, 'kept': kept}))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def four(tmp_path_factory):
    "What one process makes and what four make of the same run."
    out = tmp_path_factory.mktemp('four')
    alone = {'row': compared(out/'compared'), 'drawn': drawn(out/'compared'/ARM, out/'alone')}
    for name in ('latents', 'reference'): shutil.rmtree(out/'compared'/name)
    for name in (f'{ARM}/evaluation.json', f'{ARM}/samples.png'): (out/'compared'/name).unlink()
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    jobs = [SERVER.Process(target=one_of_four, args=(rank, port, out)) for rank in range(WORLD)]
    for job in jobs: job.start()
    for job in jobs: job.join(240)
    late = [job.kill() for job in jobs if job.is_alive()]
    assert not late and [job.exitcode for job in jobs] == [0]*WORLD
    return out, alone, [json.loads((out/f'rank-{rank}.json').read_text()) for rank in range(WORLD)]


def test_every_process_works_on_its_own_gpu(four):
    "In slfm_encode, compare and generate, and nothing is put anywhere before the processes know of each other."
    _, _, found = four
    for rank, one in enumerate(found):
        assert {(where, known) for where, known, _ in one['arrivals']} == {(rank, True)}
        asked = {who for *_, who in one['arrivals']}
        assert {'tokenizers.load_tokenizer', 'latents._encode', 'sampling.load_run', 'sampling.sample', 'features.load'} <= asked


def test_four_gpus_make_what_one_process_makes(four):
    out, alone, found = four
    index = json.loads((out/'encoded'/'index.json').read_text())
    assert index['count'] == 1438 and [s['count'] for s in index['shards']] == [400, 400, 400, 238]
    assert [one['row'] for one in found[1:]] == [{}]*3
    row, wanted = found[0]['row'][ARM], alone['row'][ARM]
    assert row['fd'] == pytest.approx(wanted['fd'], rel=1e-3) and row['protocol'] == wanted['protocol']
    assert [p['step'] for p in row['curve']] == [1, 2]
    assert [one['drawn'] for one in found[1:]] == [{}]*3
    torch.testing.assert_close(torch.tensor(found[0]['drawn']['features']), alone['drawn']['features'], atol=2e-3, rtol=0)


def test_what_is_kept_is_decided_by_the_main_process(four):
    _, _, found = four
    assert [one['kept'][0] for one in found] == [[]]*4 and len({one['kept'][1] for one in found}) == 1


def test_a_run_goes_on_from_where_the_main_process_says(monkeypatch, tmp_path):
    "Which checkpoint is the newest may look otherwise to another process, on a network drive or while another run writes."
    monkeypatch.setattr(runs, 'told_by_main', lambda own: None if own is None else Path('step-00000007'))
    loaded = []
    run = SimpleNamespace(out=tmp_path, load=loaded.append, step=7)
    monkeypatch.setattr(runs, 'newest_checkpoint', lambda out: Path('step-00000008'))
    runs.ResumableRun._start(run, 'auto')
    assert loaded == [Path('step-00000007')] and run._saved_at == 7
    monkeypatch.setattr(cli, 'told_by_main', lambda own: Path('step-00000007'))
    monkeypatch.setattr(cli, 'newest_checkpoint', lambda run: None)
    monkeypatch.setattr(cli, 'load_run', lambda run, step, *rest: step)
    assert cli._Checkpoint().load('run') == 7 and cli._Checkpoint(step=3).load('run') == 3
