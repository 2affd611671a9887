"""Guidance on a table in place of a network, every solver by hand, scheduler and pipeline against plain loops."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spherical_lfm import sphere
from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.paths import ARMS, LinearPath, SlerpPath, arm_path, shift_time
from spherical_lfm.sampling import (
    Sampler,
    guided_velocity,
    initial_noise,
    load_run,
    sample,
    tokenizer_for,
    trajectory,
    velocity_field,
)
from spherical_lfm.sit import SiT
from spherical_lfm.solvers import METHODS, adams_weights, adaptive, bogacki_shampine
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools.pipeline import FlowScheduler, SphericalSiTPipeline
from spherical_lfm.training import TrainConfig, Trainer

SHAPE = (4, 2, 2)
NULL = 3


def table(seed=0): return torch.randn(NULL + 1, *SHAPE, generator=torch.Generator().manual_seed(seed))


class Table:
    "A velocity that depends on class and time alone, in place of a network; remembers what it was asked."
    config = SimpleNamespace(in_channels=SHAPE[0], input_size=SHAPE[1], num_classes=NULL)

    def __init__(self):
        self.rows, self.times, self.classes, self.points = table(), [], [], []

    def __call__(self, z, t, y):
        self.times.append(t.clone())
        self.classes.append(y.clone())
        self.points.append(z.clone())
        return self.rows[y]*(1 + t).view(-1, 1, 1, 1).to(self.rows.dtype)


def points(n, path, seed=1): return path.prior((n, *SHAPE), torch.Generator().manual_seed(seed))


def onto(z, v): return v - (v*z).sum(1, keepdim=True)/(z*z).sum(1, keepdim=True)*z


# ---- guidance

@pytest.mark.parametrize('w,negative,expected', [
    (1., None, lambda c, u, n: c),
    (2.5, None, lambda c, u, n: u + 2.5*(c - u)),
    (0., None, lambda c, u, n: u + 0*c),
    (2.5, 1, lambda c, u, n: n + 2.5*(c - n)),
])
@pytest.mark.parametrize('arm', ['vanilla-linear', 'spherical-slerp'])
def test_guided_velocity_on_a_table(w, negative, expected, arm):
    model, path, y = Table(), ARMS[arm], torch.tensor([0, 2, 0])
    z = points(3, path)
    v = guided_velocity(model, path, z, .5, y, Sampler(guidance=w, negative=negative), NULL)
    want = 1.5*expected(model.rows[y], model.rows[NULL], model.rows[1])
    torch.testing.assert_close(v, onto(z, want) if path.spherical else want)


@pytest.mark.parametrize('t,inside', [(.29, False), (.3, True), (.5, True), (.7, True), (.71, False)])
def test_guidance_only_within_its_interval(t, inside):
    model, path, y = Table(), LinearPath(), torch.tensor([0, 2])
    c, u = model.rows[y]*(1 + t), model.rows[NULL]*(1 + t)
    want = u + 3*(c - u) if inside else c
    for time in (t, torch.full((2,), t, dtype=torch.float64)):
        found = guided_velocity(model, path, points(2, path), time, y, Sampler(guidance=3., interval=(.3, .7)), NULL)
        torch.testing.assert_close(found, want, check_dtype=False)


def test_samples_at_different_times_are_guided_each_by_its_own():
    model, path, y, t = Table(), LinearPath(), torch.tensor([0, 2, 1]), torch.tensor([.1, .5, .9])
    c, u, s = model.rows[y], model.rows[NULL], (1 + t).view(-1, 1, 1, 1)
    want = s*torch.where(torch.tensor([False, True, False]).view(-1, 1, 1, 1), u + 2*(c - u), c)
    sampler = Sampler(guidance=2., interval=(.3, .7))
    torch.testing.assert_close(guided_velocity(model, path, points(3, path), t, y, sampler, NULL), want)


# ---- the loop

@pytest.mark.parametrize('shift', [1., 3., .5])
def test_sample_visits_the_shifted_times(shift):
    model, path, steps = Table(), LinearPath(), 8
    z = sample(model, path, torch.tensor([0, 1]), Sampler(steps, shift=shift))
    times = [k/steps/(1 + (shift - 1)*(1 - k/steps)) for k in range(steps + 1)]
    assert [t[0].item() for t in model.times] == pytest.approx(times[:-1])
    want = initial_noise(path, SHAPE, range(2)) + model.rows[:2]*sum((b - a)*(1 + a) for a, b in zip(times, times[1:]))
    torch.testing.assert_close(z, want, atol=1e-5, rtol=1e-5)


def test_sample_hands_on_guidance_interval_and_negative_class():
    model, path, steps, y = Table(), LinearPath(), 10, torch.tensor([0, 2, 0])
    z = sample(model, path, y, Sampler(steps, guidance=2., interval=(.25, .65), negative=1))
    c, n = model.rows[y], model.rows[1]
    v = [(1 + k/steps)*(n + 2*(c - n) if .25 <= k/steps <= .65 else c) for k in range(steps)]
    torch.testing.assert_close(z, initial_noise(path, SHAPE, range(3)) + sum(v)/steps, atol=1e-5, rtol=1e-5)
    null = sample(model, path, y, Sampler(1, guidance=3.))
    torch.testing.assert_close(null, initial_noise(path, SHAPE, range(3)) + model.rows[NULL] + 3*(c - model.rows[NULL]),
                               atol=1e-5, rtol=1e-5)


def test_a_sample_depends_on_seed_and_number_alone():
    path, y = SlerpPath(), torch.tensor([0, 1, 2, 0, 1])

    def draw(labels=y, seed=0, **options): return sample(Table(), path, labels, Sampler(3, seed=seed), **options)
    whole = draw(seed=4)
    assert torch.equal(draw(seed=4, batch_size=2), whole)
    assert torch.equal(draw(y[3:], noise=initial_noise(path, SHAPE, range(3, 5), 4)), whole[3:])
    assert not torch.equal(draw(seed=5), whole) and len({x.sum().item() for x in whole}) == 5
    noise = points(5, path)
    assert torch.equal(draw(noise=noise, batch_size=2), draw(noise=noise, seed=9)), 'given noise is used'
    torch.testing.assert_close(initial_noise(path, SHAPE, range(5), 4),
                               2*torch.nn.functional.normalize(initial_noise(LinearPath(), SHAPE, range(5), 4), dim=1))
    gauss = initial_noise(LinearPath(), (32, 4, 4), range(40))
    assert abs(gauss.mean().item()) < .03 and gauss.std().item() == pytest.approx(1, abs=.03)


def test_the_network_samples_in_eval_mode_and_bf16_where_asked():
    net, seen = SiT.from_name('SiT-Ti/1', input_size=2, in_channels=4, num_classes=3), []
    net.blocks[0].mlp.register_forward_hook(lambda module, given, out: seen.append((module.training, out.dtype)))
    net.train()
    for precision, dtype in (('float32', torch.float32), ('bf16', torch.bfloat16)):
        seen.clear()
        z = sample(net, LinearPath(), torch.tensor([0]), Sampler(2, precision=precision))
        assert set(seen) == {(False, dtype)} and z.dtype == torch.float32 and net.training


# ---- solvers, by hand

def field(z, t, end=None): return torch.stack([z[:, 1], -z[:, 0], z[:, 3]*z[:, 2], t + 0*z[:, 3]], 1)


def flat_by_hand(method, z, h, steps):
    "Textbook methods in flat space; multi-step ones begin with a step of Heun."
    f, history = field, []
    for k in range(steps):
        t = k*h
        a = f(z, t)
        history.insert(0, a)
        heun = z + h/2*(a + f(z + h*a, t + h))
        if method in ('euler', 'flow_map'): z = z + h*a # the field has no other mean than itself
        elif method == 'heun': z = heun
        elif method == 'rk4':
            b = f(z + h/2*a, t + h/2)
            c = f(z + h/2*b, t + h/2)
            z = z + h/6*(a + 2*b + 2*c + f(z + h*c, t + h))
        elif len(history) == 1: z = heun
        elif method == 'adams2' or len(history) == 2: z = z + h*(3/2*history[0] - 1/2*history[1])
        else: z = z + h*(23/12*history[0] - 16/12*history[1] + 5/12*history[2])
    return z


@pytest.mark.parametrize('method', list(METHODS))
def test_every_solver_is_the_textbooks(method):
    z = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want, past = flat_by_hand(method, z, .1, 5), []
    for k in range(5): z = METHODS[method].step(field, LinearPath(), z, k*.1, .1, past)
    torch.testing.assert_close(z, want)


@pytest.mark.parametrize('method', list(METHODS))
def test_every_solver_calls_the_field_as_often_as_it_says(method):
    calls, path = [], SlerpPath()
    def counted(z, t, end=None):
        calls.append(t)
        return path.tangent(z, field(z, t))
    z, past = points(2, path), []
    z = METHODS[method].step(counted, path, z, 0., .1, past)
    calls.clear()
    METHODS[method].step(counted, path, z, .1, .1, past)
    assert len(calls) == METHODS[method].evaluations and calls[0] == pytest.approx(.1)


def exp(z, u):
    "The exponential map on the sphere of radius |z|, in float64."
    r, n = z.norm(dim=1, keepdim=True), u.norm(dim=1, keepdim=True)
    return torch.cos(n/r)*z + torch.sin(n/r)*r*u/n


def carried(z, w, v):
    "Parallel transport by rotating in the plane of z and w."
    a, b = (x/x.norm(dim=1, keepdim=True) for x in (z, w))
    return v - (v*b).sum(1, keepdim=True)/(1 + (a*b).sum(1, keepdim=True))*(a + b)


def back(z, u, v):
    "How u must change for exp_z(u) to move with v: by solving the numerical derivative."
    out = torch.zeros_like(v)
    for b, i, j in np.ndindex(z.shape[0], *z.shape[2:]):
        zz, uu, vv = (x[b, :, i, j][None, :, None, None] for x in (z, u, v))
        basis = [onto(zz, torch.eye(4, dtype=torch.float64)[k][None, :, None, None]) for k in range(4)]
        moves = torch.stack([((exp(zz, uu + 1e-6*e) - exp(zz, uu - 1e-6*e))/2e-6).flatten() for e in basis], 1)
        weights = torch.linalg.lstsq(moves, vv.flatten(), driver='gelsd').solution
        out[b, :, i, j] = sum(w*e.flatten() for w, e in zip(weights, basis))
    return out


def adams_step(method, a, old):
    "The velocity of a step from the one at hand and those before, at even times."
    if method == 'adams2' or len(old) == 1: return 3/2*a - 1/2*old[0]
    return 23/12*a - 16/12*old[0] + 5/12*old[1]


@pytest.mark.parametrize('method', ['euler', 'heun', 'rk4', 'adams2', 'adams3'])
def test_every_solver_on_the_sphere_by_hand(method):
    path, h = SlerpPath(), .2
    z = points(1, path).double()

    def f(z, t): return onto(z, field(z, t))
    want, past, history = z, [], []
    for k in range(3):
        t, a = k*h, f(want, k*h)
        history.insert(0, (want, a))

        def stage(u, c, start=want, t=t): return back(start, u, f(exp(start, u), t + c*h))
        if method == 'euler': step = a
        elif method == 'rk4':
            b = stage(h/2*a, .5)
            c = stage(h/2*b, .5)
            step = (a + 2*b + 2*c + stage(h*c, 1.))/6
        elif method == 'heun' or len(history) == 1: step = (a + stage(h*a, 1.))/2
        else:
            old = [carried(p, want, v) for p, v in history[1:]]
            step = adams_step(method, a, old)
        want = exp(want, h*step)
        z = METHODS[method].step(f, path, z, t, h, past)
    torch.testing.assert_close(z, want, atol=1e-6, rtol=1e-6)


def test_adams_weights_integrate_polynomials_over_uneven_times():
    times, t, dt = [.4, .25, .1], .4, .3
    w = adams_weights(times, t, dt)
    for power in range(3):
        assert sum(a*s**power for a, s in zip(w, times))*dt == pytest.approx(((t + dt)**(power + 1)
                                                                              - t**(power + 1))/(power + 1))
    assert adams_weights([1., 0.], 1., 1.) == pytest.approx([1.5, -.5])


def test_bogacki_shampine_is_the_published_pair():
    z, h = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64), .1
    k1 = field(z, .3)
    k2 = field(z + h/2*k1, .3 + h/2)
    k3 = field(z + 3/4*h*k2, .3 + 3/4*h)
    third = z + h*(2/9*k1 + 1/3*k2 + 4/9*k3)
    k4 = field(third, .3 + h)
    second = z + h*(7/24*k1 + 1/4*k2 + 1/3*k3 + 1/8*k4)
    ahead, v, error = bogacki_shampine(field, LinearPath(), z, .3, h)
    for found, want in ((ahead, third), (v, k4), (error, third - second)): torch.testing.assert_close(found, want)


def test_the_adaptive_method_ends_at_1_within_its_tolerance():
    def grow(z, t): return z*(4*t).view(-1, 1, 1, 1)
    z = torch.ones(2, 4, 2, 2)
    for tolerance in (1e-2, 1e-4):
        end, evaluations = adaptive(grow, LinearPath(), z, tolerance)
        assert (end - math.e**2).abs().max() < 30*tolerance
    assert evaluations > adaptive(grow, LinearPath(), z, 1e-2)[1]


# ---- scheduler and pipeline

@pytest.mark.parametrize('arm', list(ARMS))
@pytest.mark.parametrize('shift', [1., 2.])
def test_the_euler_scheduler_is_sample_step_by_step(arm, shift):
    path, scheduler, y = ARMS[arm], FlowScheduler(arm, shift=shift), torch.tensor([0, 1])
    model, z, sampler = Table(), initial_noise(path, SHAPE, range(2)), Sampler(5, shift=shift)
    passed = list(trajectory(velocity_field(model, path, y), path, z, sampler.times))
    assert torch.equal(sample(model, path, y, sampler), passed[-1][1])
    scheduler.set_timesteps(5)
    for t, (_, want) in zip(scheduler.timesteps, passed):
        z = scheduler.step(model(z, t.expand(2), y), t, z).prev_sample
        torch.testing.assert_close(z, want, atol=1e-6, rtol=1e-6)
    assert len(passed) == 5 == len(scheduler.timesteps) and passed[-1][0] == 1


@pytest.mark.parametrize('method', ['adams2', 'adams3'])
@pytest.mark.parametrize('arm', ['vanilla-linear', 'spherical-slerp'])
def test_multi_step_schedulers_by_hand(method, arm):
    "Euler first; from then on the weights of Adams and Bashforth on transported velocities."
    path, scheduler, h, history = ARMS[arm], FlowScheduler(arm, method), .25, []
    scheduler.set_timesteps(4)
    z = want = points(2, path).double()
    for k, t in enumerate(scheduler.timesteps):
        z = scheduler.step(field(z, float(t)), t, z).prev_sample
        a = field(want, k*h)
        if path.spherical: a = onto(want, a)
        history.insert(0, (want, a))
        old = [carried(p, want, v) if path.spherical else v for p, v in history[1:]]
        step = adams_step(method, a, old) if k else a
        want = exp(want, h*step) if path.spherical else want + h*step
        torch.testing.assert_close(z, want, atol=1e-6, rtol=1e-6)


def test_a_new_plan_of_the_scheduler_forgets_the_past():
    scheduler, z = FlowScheduler('vanilla-linear', 'adams2'), torch.zeros(1, *SHAPE)
    for _ in range(2):
        scheduler.set_timesteps(2)
        assert scheduler.step(torch.ones_like(z), 0., z).prev_sample.mean() == pytest.approx(.5)
        assert scheduler.step(3*torch.ones_like(z), .5, z).prev_sample.mean() == pytest.approx(.5*(1.5*3 - .5))


def test_added_noise_is_the_point_of_the_path():
    path, scheduler = SlerpPath(), FlowScheduler()
    z0, z1, t = points(3, path, 1), points(3, path, 2), torch.tensor([0., .3, 1.])
    torch.testing.assert_close(scheduler.add_noise(z1, z0, t), path.interpolate(z0, z1, t)[0])
    assert torch.equal(scheduler.scale_model_input(z0), z0)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two steps of a few arms, with two checkpoints each; averages are far from the weights."
    root, tokenizer = tmp_path_factory.mktemp('runs'), load_tokenizer('digits')
    encode_latents(tokenizer, ImageSource('digits'), root/'latents', Encoding(flip=False), order=torch.arange(60), progress=False)
    for name, extra in (('plain', {}), ('unprojected', dict(project_velocity=False)),
                        ('vanilla-linear', dict(arm='vanilla-linear'))):
        config = TrainConfig(model='SiT-Ti/2', steps=2, batch_size=8, lr=.1, checkpoint_every=1, label_dropout=.5,
                             ema_decay=.5, **extra)
        Trainer(config, LatentDataset(root/'latents', project=arm_path(config.arm).projection),
                root/name).fit(progress=False)
    return root


def test_a_loaded_run_is_its_average_and_its_path(runs):
    from safetensors.torch import load_file
    for name, text in (('plain', 'SlerpPath(project_velocity=True, exponential=True)'),
                       ('unprojected', 'SlerpPath(project_velocity=False, exponential=True)'),
                       ('vanilla-linear', 'LinearPath(spherical=False)')):
        for step in (None, 1, 2):
            model, path, record = load_run(runs/name, step)
            folder = runs/name/'checkpoints'/f'step-{step or 2:08d}'
            ema, raw = (load_file(folder/k/'diffusion_pytorch_model.safetensors') for k in ('ema', 'model'))
            assert repr(path) == text and record['step'] == (step or 2) and not model.training
            found = model.state_dict()
            assert all(torch.equal(found[k], ema[k]) for k in found)
            assert any(not torch.equal(found[k], raw[k]) for k in found)
    assert json.loads((folder/'state.json').read_text())['step'] == 2


def test_the_tokenizer_of_a_run_projects_if_its_arm_does(runs):
    for name, spherical in (('plain', True), ('unprojected', True), ('vanilla-linear', False)):
        assert tokenizer_for(load_run(runs/name)[2], 'digits').spherical == spherical


@pytest.mark.parametrize('settings', [dict(guidance_scale=1.), dict(guidance_scale=3., guidance_interval=(.2, .8)),
                                      dict(guidance_scale=2., negative_class=4)])
def test_the_pipeline_is_sample_and_decode(runs, settings):
    pipe = SphericalSiTPipeline.from_run(runs/'plain', tokenizer='digits')
    pipe.set_progress_bar_config(disable=True)
    model, path, record = load_run(runs/'plain')
    y = [1, 0, 7]
    noise = path.prior((3, 16, 4, 4), torch.Generator().manual_seed(5))
    sampler = Sampler(4, guidance=settings['guidance_scale'], interval=settings.get('guidance_interval', (0., 1.)),
                      negative=settings.get('negative_class'))
    z = sample(model, path, torch.tensor(y), sampler, noise)
    found = pipe(y, num_inference_steps=4, generator=torch.Generator().manual_seed(5), output_type='latent',
                 **settings).images
    torch.testing.assert_close(found, z, atol=1e-4, rtol=1e-4)
    plain = pipe(y, num_inference_steps=4, generator=torch.Generator().manual_seed(5), output_type='latent').images
    assert torch.allclose(plain, z, atol=1e-2) == (settings['guidance_scale'] == 1), 'guidance matters here'


def test_shift_time_by_hand():
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 3.), t/(3 - 2*t))
    torch.testing.assert_close(shift_time(t, 1.), t)


def test_transport_and_pullback_by_hand():
    g = torch.Generator().manual_seed(0)
    z, w = (sphere.project(torch.randn(2, 4, 2, 2, generator=g, dtype=torch.float64)) for _ in range(2))
    v = onto(z, torch.randn(z.shape, generator=g, dtype=torch.float64))
    torch.testing.assert_close(sphere.transport(z, w, v), carried(z, w, v), atol=1e-6, rtol=1e-6)
    u = onto(z, torch.randn(z.shape, generator=g, dtype=torch.float64))*.4
    end = exp(z, u)
    moved = onto(end, torch.randn(z.shape, generator=g, dtype=torch.float64))
    torch.testing.assert_close(sphere.dexp_inverse(z, u, moved), back(z, u, moved), atol=1e-6, rtol=1e-6)
