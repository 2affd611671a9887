"""A network that predicts data: its velocity, its loss, its sampler and its runs, against formulas and known flows."""
import json
import math
import shutil

import pytest
import torch

from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.engine.runs import seeded_generator
from spherical_lfm.paths import ARMS, SlerpPath, arm_path
from spherical_lfm.prediction import speed_factors, speed_profile
from spherical_lfm.sampling import (
    LoadedRun,
    Sampler,
    _walk,
    guided_velocity,
    initial_noise,
    load_run,
    sample,
    trajectory,
    velocity_field,
)
from spherical_lfm.sit import SiT
from spherical_lfm.solvers import adaptive
from spherical_lfm.sphere import exp_map, project, tangent
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools.pipeline import FlowScheduler, SphericalSiTPipeline
from spherical_lfm.training import TrainConfig, Trainer, flow_loss

SHAPE = (6, 4, 2, 2)
METHODS = ['euler', 'heun', 'rk4', 'adams2', 'adams3']


def ends(arm, dtype=torch.float64, seed=0):
    "Noise and data of an arm."
    z0, z1 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (project(z0), project(z1)) if ARMS[arm].spherical else (z0, 1.3*z1)


def displacement(arm, z, x):
    "The output of a network that expects the path to end in `x`."
    return x if 'linear' in arm else x - z


@pytest.mark.parametrize('arm', ARMS)
def test_velocities_are_those_of_the_formulas(arm):
    "With ten degrees and more to go, and with almost no time left."
    path, g = arm_path(arm, prediction='data'), torch.Generator().manual_seed(1)
    z, x = ends(arm)
    out = torch.randn(SHAPE, generator=g, dtype=torch.float64)
    for s in (0., .3, .999):
        t = torch.full((6,), s, dtype=torch.float64)
        found = path.velocity(z, t, out)
        if 'linear' in arm: want = (out - z)/(1 - s)
        else:
            end = z + out
            u, w = z/z.norm(dim=1, keepdim=True), end/end.norm(dim=1, keepdim=True)
            theta = torch.acos((u*w).sum(1, keepdim=True))
            turn = theta/torch.sin(theta)*(w - torch.cos(theta)*u)*z.norm(dim=1, keepdim=True)
            grown = (end.norm(dim=1, keepdim=True) - z.norm(dim=1, keepdim=True))*u
            want = (turn + grown*(arm == 'vanilla-shell'))/(1 - s)
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(path.velocity(z, t, displacement(arm, z, x)), path.toward(z, x, 1 - s))
    assert ARMS[arm].prediction == 'velocity' and ARMS[arm].velocity(z, t, out) is out, 'the arm itself is untouched'


@pytest.mark.parametrize('arm', ARMS)
def test_loss_by_hand_and_none_for_whoever_knows_the_data(arm):
    "Errors of the way that is left; on linear paths, of the point itself."
    path = arm_path(arm, prediction='data')
    z0, z1 = ends(arm)
    t, y = torch.tensor([0., .2, .5, .9, .96, .999], dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    knows = lambda z, t, y: displacement(arm, z, z1)
    assert flow_loss(knows, path, z0, z1, t, y)[0].max() < 1e-10
    z_t, v_t = path.interpolate(z0, z1, t)
    off = z1 + .1*torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, power = flow_loss(lambda z, t, y: displacement(arm, z, off), path, z0, z1, t, y)
    said = path.toward(z_t, project(off) if path.spherical and 'slerp' in arm else off, (1 - t).view(-1, 1, 1, 1))
    weight = (1 - t).square()
    if 'linear' in arm: torch.testing.assert_close(found, (off - z1).square().mean((1, 2, 3)).to(found.dtype))
    torch.testing.assert_close(found, ((said - v_t).square().mean((1, 2, 3))*weight).to(found.dtype), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(power, (v_t.square().mean((1, 2, 3))*weight).to(power.dtype), rtol=1e-4, atol=1e-9)
    stays = flow_loss(lambda z, t, y: displacement(arm, z, z), path, z0, z1, t, y)
    torch.testing.assert_close(*stays, rtol=1e-4, atol=1e-9) # one per power: a network that does not move


@pytest.mark.parametrize('arm', ARMS)
def test_a_fresh_network_learns_at_every_time(arm):
    "An output of zero has a loss and a gradient that are finite and not zero, also where no time is left."
    path = arm_path(arm, prediction='data')
    z0, z1 = ends(arm, torch.float32)
    t = torch.tensor([0., .1, .5, .9, .99, 1.])
    out = torch.zeros(SHAPE, requires_grad=True)
    loss, _ = flow_loss(lambda z, t, y: out, path, z0, z1, t, None)
    loss.sum().backward()
    assert loss.isfinite().all() and out.grad.isfinite().all() and (out.grad[:5].abs().amax((1, 2, 3)) > 1e-5).all()


def small(**options):
    "A small network whose output is not zero."
    torch.manual_seed(0)
    net = SiT(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, **options).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if name != 'alpha': p += .1*torch.randn(p.shape, generator=g)
    return net


def test_the_skip_adds_a_multiple_of_the_position():
    "None at first, then α(t) z; nothing else of the network changes, and slerp does not see it."
    plain, free = small(), small(skip=True)
    g = torch.Generator().manual_seed(1)
    z, t, y = project(torch.randn(3, 4, 4, 4, generator=g)), torch.tensor([.1, .5, .9]), torch.tensor([0, 1, 3])
    assert plain.alpha is None and torch.equal(free(z, t, y), plain(z, t, y))
    free.alpha += torch.randn(16, generator=g)
    when = free.t_embedder(t)
    times = (when*torch.sigmoid(when)) @ free.alpha
    torch.testing.assert_close(free(z, t, y), plain(z, t, y) + times.view(3, 1, 1, 1)*z)
    assert times.abs().min() > .01
    torch.testing.assert_close(tangent(z, free(z, t, y)), tangent(z, plain(z, t, y)), rtol=1e-4, atol=1e-5)
    assert torch.equal(SiT.from_sit_checkpoint(free.state_dict(), num_heads=2).alpha, free.alpha)
    older = {k: v for k, v in plain.config.items() if k != 'skip'}
    assert SiT.from_config(older).alpha is None
    with pytest.raises(ValueError, match='tangent projection of slerp takes away: leave it out'): TrainConfig(skip=True)
    TrainConfig(skip=True, prediction='data'), TrainConfig(skip=True, project_velocity=False), TrainConfig('spherical-linear', skip=True)
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in plain.parameters()) == 16


@pytest.mark.parametrize('arm', ['vanilla-linear', 'spherical-slerp'])
def test_a_profile_of_speed_by_hand(arm):
    "A network that says half of what is true, and on slerp a lot about norms, which does not count."
    path, y = ARMS[arm], torch.zeros(6, dtype=torch.long)
    z1 = ends(arm, torch.float32)[1]
    z0 = path.prior(z1.shape, seeded_generator('cpu', 7))
    def half(z, t, y): return .5*path.interpolate(z0, z1, t)[1] + 3*z*path.spherical
    found = speed_profile(LoadedRun(half, path, {}), z1, y, 4, seed=7)
    assert found['times'] == [.125, .375, .625, .875]
    assert found['speed'] == pytest.approx([.5]*4, abs=1e-4) and found['errors'] == pytest.approx([.25]*4, abs=1e-4)


# --- known flows

MEAN, SPREAD = .7, .4

def gaussian(z, t, y):
    "What one should expect of data N(0.7, 0.4²) on the linear path."
    t = t.to(z).view(-1, 1, 1, 1)
    return MEAN + t*SPREAD**2/(t**2*SPREAD**2 + (1 - t)**2)*(z - t*MEAN)


def missed(method, steps):
    "How far samples of the Gaussian flow are from where it leads: every noise z to 0.7 + 0.4 z."
    path = arm_path('vanilla-linear', prediction='data')
    z = initial_noise(path, (4, 4, 4), range(4)).double()
    def field(z, t): return guided_velocity(gaussian, path, z, t, torch.zeros(4))
    *_, (t, found) = _walk(field, path, z, Sampler(steps, method, tolerance=1e-4))
    assert t == 1
    return (found - (MEAN + SPREAD*z)).abs().max().item()


@pytest.mark.parametrize('method, order', [('euler', 1), ('heun', 2), ('rk4', 2), ('adams2', 2), ('adams3', 2)])
def test_order_of_convergence(method, order):
    "The last step is Euler's: one step of second order, so no method is better than that."
    coarse, fine = missed(method, 40), missed(method, 80)
    assert math.log2(coarse/fine) == pytest.approx(order, abs=.25) and fine < .03/order**3


def test_the_adaptive_method_keeps_its_tolerance():
    assert missed('adaptive', 1) < 1e-3


def turning(z, t):
    "A field of tangent vectors on the sphere that changes with place and time."
    t = torch.as_tensor(t, dtype=z.dtype).reshape(-1, 1, 1, 1)
    return tangent(z, torch.stack([z[:, 1]*z[:, 2], z[:, 3] - t[:, 0], torch.cos(z[:, 0]), z[:, 1] + 2*t[:, 0]], 1))


def foresees(z, t, y):
    "The network whose data point lies where the field of `turning` would lead in the time that is left."
    left = (1 - t).view(-1, 1, 1, 1)
    return exp_map(z, left*turning(z, t)) - z


@pytest.mark.parametrize('method', METHODS)
def test_on_the_sphere_it_is_the_velocity_it_stands_for(method):
    "Every method goes as with the velocity, but for the last step, which lands on the predicted point."
    path, times = arm_path('spherical-slerp', prediction='data'), Sampler(8, method).times
    z = initial_noise(path, SHAPE[1:], range(6)).double()
    def field(z, t): return guided_velocity(foresees, path, z, t, torch.zeros(6))
    places = dict([(0., z), *_walk(field, path, z, Sampler(8, method))])
    plain = dict([(0., z), *_walk(turning, SlerpPath(), z, Sampler(8, method))])
    for t in times[:-1]: torch.testing.assert_close(places[t], plain[t], rtol=1e-6, atol=1e-6)
    last = places[times[-2]]
    torch.testing.assert_close(places[1.], exp_map(last, turning(last, times[-2])/8), rtol=1e-6, atol=1e-6)


def test_guidance_leads_away_by_velocities():
    "v_u + w (v_c - v_u), each made of its own data point."
    path, t = arm_path('spherical-slerp', prediction='data'), .4
    z = initial_noise(path, SHAPE[1:], range(6))
    table = torch.randn(3, *SHAPE[1:], generator=torch.Generator().manual_seed(3))
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    found = guided_velocity(lambda z, t, y: table[y], path, z, t, y, Sampler(guidance=3.), null_class=2)
    of = lambda y: path.velocity(z, torch.full((6,), t), table[y])
    nobody = of(torch.full_like(y, 2))
    torch.testing.assert_close(found, tangent(z, nobody + 3*(of(y) - nobody)))


# --- the scheduler, and real runs

def test_a_scheduler_that_is_older_predicts_velocities():
    config = {k: v for k, v in FlowScheduler('vanilla-shell', 'adams2').config.items() if k != 'prediction'}
    assert FlowScheduler.from_config(config).path.prediction == 'velocity'


@pytest.mark.parametrize('method', ['euler', 'adams2', 'adams3'])
def test_a_loop_over_the_scheduler_takes_what_the_model_gives(method):
    scheduler = FlowScheduler('spherical-slerp', method, prediction='data')
    path, z = scheduler.path, initial_noise(SlerpPath(), SHAPE[1:], range(6)).double()
    scheduler.set_timesteps(4)
    want, past = z, []
    for k, t in enumerate(scheduler.timesteps):
        v = turning(want, k/4)
        if k in (0, 3) or method == 'euler': ahead = exp_map(want, v/4)
        else:
            old = [path.transport(p, want, u) for p, u in past[:int(method[-1]) - 1]]
            weights = {1: (1.5, -.5), 2: (23/12, -16/12, 5/12)}[len(old)]
            ahead = exp_map(want, sum(a*u for a, u in zip(weights, (v, *old)))/4)
        past, want = [(want, v), *past], ahead
        z = scheduler.step(foresees(z, torch.full((6,), float(t), dtype=z.dtype), None), t, z).prev_sample
        torch.testing.assert_close(z, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module', params=['vanilla-linear', 'spherical-slerp'])
def run(request, tmp_path_factory):
    "Three steps of an arm whose network predicts data."
    root = tmp_path_factory.mktemp('data')
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), root/'latents', Encoding(flip=False), order=torch.arange(64), progress=False)
    return fit(root, arm=request.param, prediction='data', skip=request.param == 'vanilla-linear')


def fit(root, steps=3, **settings):
    config = TrainConfig(model='SiT-Ti/2', steps=steps, batch_size=8, lr=.01, **settings)
    data = LatentDataset(root/'latents', project=arm_path(config.arm).projection)
    trainer = Trainer(config, data, root/'run')
    assert trainer.path.prediction == config.prediction
    trainer.fit(progress=False)
    return root


def test_a_run_remembers_what_it_predicts(run):
    model, path, record = load_run(run/'run')
    assert path.prediction == record['config']['prediction'] == 'data' and "prediction='data'" in repr(path)
    assert (model.alpha is not None) == record['config']['skip'] == ('spherical' not in record['config']['arm'])
    y = torch.arange(6)
    plain = sample(model, path.predicting('velocity'), y, Sampler(4))
    for method in (*METHODS, 'adaptive'): assert sample(model, path, y, Sampler(4, method)).isfinite().all()
    once = {m: sample(model, path, y, Sampler(1, m)) for m in METHODS}
    for m in METHODS: assert torch.equal(once[m], once['euler']), 'a single step is the last one'
    found = sample(model, path, y, Sampler(4, 'adams2'))
    assert not torch.allclose(found, plain, atol=.1)
    pipe = SphericalSiTPipeline.from_run(run/'run', tokenizer='digits')
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction == 'data'
    pipe.save_pretrained(run/'saved')
    for p in (pipe, SphericalSiTPipeline.from_pretrained(run/'saved')):
        p.set_progress_bar_config(disable=True)
        noise = initial_noise(path, found.shape[1:], range(6))
        drawn = p(y, num_inference_steps=4, latents=noise, output_type='latent').images
        torch.testing.assert_close(drawn, sample(model, path, y, Sampler(4)), rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_as_what_it_was(run, tmp_path):
    "A changed prediction is refused; a checkpoint that is older than the setting predicted velocities."
    run = shutil.copytree(run, tmp_path/'copy')
    config = load_run(run/'run').record['config']
    arm, skip = config['arm'], config['skip']
    with pytest.raises(ValueError, match='changed settings .prediction: data -> velocity.: use another output folder'):
        fit(run, steps=4, arm=arm, skip=skip)
    for state in (run/'run'/'checkpoints').glob('*/state.json'):
        saved = json.loads(state.read_text())
        del saved['config']['prediction']
        state.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match='prediction: velocity -> data'): fit(run, steps=4, arm=arm, prediction='data', skip=skip)
    assert load_run(run/'run').path.prediction == 'velocity'
    fit(run, steps=4, arm=arm, skip=skip)
    assert load_run(run/'run').record['step'] == 4


def test_unknown_predictions_are_refused():
    for make in (lambda: TrainConfig(prediction='noise'), lambda: FlowScheduler(prediction='noise'), lambda: arm_path('vanilla-shell', prediction='x')):
        with pytest.raises(ValueError, match="prediction must be 'velocity' or 'data', got"): make()


@pytest.mark.parametrize('prediction', ['velocity', 'data'])
@pytest.mark.parametrize('arm', ARMS)
def test_a_sampler_with_another_speed(arm, prediction):
    "Euler by hand with factors that are linear between the middles of their spans; factors of one change nothing."
    path, net, y = arm_path(arm, prediction=prediction), small(), torch.tensor([0, 1, 2])
    z = path.prior((3, 4, 4, 4), torch.Generator().manual_seed(0))
    factors, want = (3., 1.5, .5), z
    for t, f in zip((0., .25, .5, .75), (3., 2.625, 1.5, .75)): # where each step begins
        times = torch.full((3,), t)
        want = path.step(want, f*path.tangent(want, path.velocity(want, times, net(want, times, y))), .25)
    torch.testing.assert_close(sample(net, path, y, Sampler(4, speed=factors), z), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(sample(net, path, y, Sampler(4, speed=[1.]), z), sample(net, path, y, Sampler(4), z))
    assert Sampler(**json.loads(json.dumps(Sampler(speed=factors).settings))) == Sampler(speed=factors)


@pytest.mark.parametrize('method', ['heun', 'rk4', 'adaptive'])
def test_other_solvers_have_the_speed_too(method):
    "A field of unit speed on a line, at double speed: twice the way; a sample with a time of its own has its own factor."
    path, y = ARMS['vanilla-linear'], torch.zeros(2, dtype=torch.long)
    field = velocity_field(lambda z, t, y: torch.ones_like(z), path, y, Sampler(speed=(2.,)))
    z = torch.zeros(2, 4, 2, 2)
    end = adaptive(field, path, z)[0] if method == 'adaptive' else [w for _, w in trajectory(field, path, z, [0., .5, 1.], method)][-1]
    torch.testing.assert_close(end, torch.full_like(end, 2.))
    field = velocity_field(lambda z, t, y: torch.ones_like(z), path, y, Sampler(speed=(1., 3.)))
    assert field(z, torch.tensor([.25, .5]))[:, 0, 0, 0].tolist() == [1., 2.]


def test_factors_of_speed():
    profile = {'speed': [.5, .8], 'errors': [.36, .36]}
    assert speed_factors(profile) == pytest.approx((2., 1.25)) and speed_factors(profile, own=True) == pytest.approx((1.6, 1.))
    assert speed_factors(profile, .5) == pytest.approx((2**.5, 1.25**.5)) and speed_factors(profile, 0.) == (1., 1.)
    assert speed_factors({'speed': [0.], 'errors': [1.5]}) == (10.,) and speed_factors({'speed': [0.], 'errors': [1.5]}, own=True) == (1.,), 'nothing learned'
    for bad in ((0.,), (-1., 1.), (float('nan'),)):
        with pytest.raises(ValueError, match='speed must be'): Sampler(speed=bad)
