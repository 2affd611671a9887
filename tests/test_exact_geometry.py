"""Norms, radial shares, paths and the sphere against scipy, numpy and formulas written out by hand."""
import math

import numpy as np
import pytest
import torch
from scipy import stats

from spherical_lfm import concentration, sphere
from spherical_lfm.concentration import (
    chi_mean,
    chi_variance,
    expected_excursion,
    isotropic_pair,
    linear_radial_share,
    norm_stats,
    off_shell_distance,
    pair_profile,
    path_norms,
    radial_share,
    shell_tail_bound,
)
from spherical_lfm.engine.processes import RunningMoments
from spherical_lfm.paths import ARMS, LinearPath, ShellPath, SlerpPath, arm_path
from spherical_lfm.tools.studies import TokenStatistics, geometry_row, rule_of_thumb


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- concentration

@pytest.mark.parametrize('d', [2, 4, 16, 32, 99, 100, 1000])
def test_chi_moments_are_scipys(d):
    assert chi_mean(d) == pytest.approx(stats.chi.mean(d), rel=1e-9)
    assert chi_variance(d) == pytest.approx(stats.chi.var(d), rel=1e-6 if d < 100 else 1e-3)


def test_the_tail_bound_by_hand_and_above_the_tail():
    width = math.sqrt(16) - stats.chi.mean(16) + 2
    assert shell_tail_bound(16, width) == pytest.approx(2*math.exp(-2))
    assert shell_tail_bound(16, .1) == 1.
    for w in (1.5, 2., 3.): assert stats.chi.sf(4 + w, 16) + stats.chi.cdf(4 - w, 16) < shell_tail_bound(16, w)


def test_norm_statistics_are_numpys():
    z = gauss(5, 8, 3, 2)
    r = np.sqrt((z.numpy()**2).sum(1))
    found = norm_stats(z)
    want = {'d': 8, 'count': 30, 'mean': r.mean(), 'std': r.std(), 'cv': r.std()/r.mean(),
            'mean_over_sqrt_d': r.mean()/np.sqrt(8),
            'min': r.min(), 'max': r.max()}
    assert found == pytest.approx(want)


def test_running_moments_are_numpys_in_any_split():
    rows = gauss(50, 3)*torch.tensor([1., 5., .1]) + 7
    for cuts in ([50], [1, 2, 47], [25, 25]):
        moments = RunningMoments(3)
        for part in rows.split(cuts): moments.update(part)
        for found, want in ((moments.mean, rows.numpy().mean(0)), (moments.std, rows.numpy().std(0)),
                            (moments.min, rows.numpy().min(0)),
                            (moments.max, rows.numpy().max(0))):
            np.testing.assert_allclose(found.numpy(), want, rtol=1e-10)
        assert moments.count == 50


def test_radial_share_on_two_tokens_by_hand():
    "Velocities (3, 4) at (2, 0) and (0, 1) at (0, 5): radial parts 3 and 1, powers 25 and 1."
    z = torch.tensor([[2., 0.], [0., 5.]])[..., None, None]
    v = torch.tensor([[3., 4.], [0., 1.]])[..., None, None]
    assert radial_share(z, v) == pytest.approx((9 + 1)/(25 + 1))


@pytest.mark.parametrize('r1', [1., .35])
def test_the_closed_form_is_what_chords_do(r1):
    d = 4096
    z0, z1 = sphere.project(gauss(300, d, 1, 1)), r1*sphere.project(gauss(300, d, 1, 1, seed=1))
    for t in (0., .25, .5, 1.):
        found = radial_share(*LinearPath().interpolate(z0, z1, torch.full((300,), t, dtype=torch.float64)))
        assert found == pytest.approx(linear_radial_share(t, 1., r1).item(), abs=.01)
    for t in (0., .25, .9): # a common unit of both radii drops out
        assert linear_radial_share(t, 3., 3*r1).item() == pytest.approx(linear_radial_share(t, 1., r1).item())
    assert linear_radial_share(0., 1., r1).item() == pytest.approx(1/(1 + r1**2))
    assert linear_radial_share(1., 1., r1).item() == pytest.approx(r1**2/(1 + r1**2))


def test_excursion_by_hand():
    "At 0.7 the shells (1.0, 0.1) and (0.5, 0.05) are 3 and 4 widths away: the nearer counts; at 1.1 and 0.5 less."
    assert off_shell_distance(torch.tensor([1.1, .7, .5]), ((1., .1), (.5, .05))) == pytest.approx(3.)


def test_isotropic_pairs_have_the_norms_asked_for():
    noise, data = isotropic_pair(16, .6, .1, 20_000)
    assert noise.shape == data.shape == (20_000, 16, 1, 1)
    s = norm_stats(data)
    assert s['mean_over_sqrt_d'] == pytest.approx(.6, rel=.01) and s['cv'] == pytest.approx(.1, rel=.03)
    assert norm_stats(noise)['mean'] == pytest.approx(chi_mean(16), rel=.01)
    assert abs((noise*data).sum(1).mean().item()) < .1


def numeric_velocity(path, z0, z1, t, step=1e-5):
    "Central difference of the position."
    ahead, behind = (path.interpolate(z0, z1, t + s)[0] for s in (step, -step))
    return (ahead - behind)/(2*step)


@pytest.mark.parametrize('arm', list(ARMS))
def test_velocity_is_the_derivative_of_the_position(arm):
    path = ARMS[arm]
    z0, z1 = gauss(4, 6, 2, 2), .7*gauss(4, 6, 2, 2, seed=1)
    if path.spherical: z0, z1 = sphere.project(z0), sphere.project(z1)
    for time in (.1, .5, .8):
        t = torch.full((4,), time, dtype=torch.float64)
        torch.testing.assert_close(path.interpolate(z0, z1, t)[1], numeric_velocity(path, z0, z1, t), atol=1e-6,
                                   rtol=1e-6)
    for time, end in ((0., z0), (1., z1)):
        torch.testing.assert_close(path.interpolate(z0, z1, torch.full((4,), time, dtype=torch.float64))[0], end,
                                   atol=1e-9, rtol=1e-9)


def test_the_shell_path_by_hand():
    "From (2, 0) to (0, 4): halfway the direction is at 45 degrees and the norm 3."
    z0, z1 = torch.tensor([[2., 0.]])[..., None, None], torch.tensor([[0., 4.]])[..., None, None]
    z, v = ShellPath().interpolate(z0, z1, torch.tensor([.5]))
    u, du = np.array([1., 1.])/math.sqrt(2), np.array([-1., 1.])/math.sqrt(2)*math.pi/2
    np.testing.assert_allclose(z.flatten(), 3*u, rtol=1e-6)
    np.testing.assert_allclose(v.flatten(), 2*u + 3*du, rtol=1e-5)


def test_the_slerp_path_by_hand():
    "A quarter circle of radius sqrt(2) from (R, 0) to (0, R) at constant speed."
    root = math.sqrt(2)
    z0, z1 = torch.tensor([[root, 0.]])[..., None, None], torch.tensor([[0., root]])[..., None, None]
    for t in (0., .25, 1.):
        z, v = SlerpPath().interpolate(z0, z1, torch.tensor([t]))
        a = t*math.pi/2
        np.testing.assert_allclose(z.flatten(), [root*math.cos(a), root*math.sin(a)], atol=1e-6)
        np.testing.assert_allclose(v.flatten(), [-root*math.sin(a)*math.pi/2, root*math.cos(a)*math.pi/2], atol=1e-5)


def test_path_norms_and_pair_profile_agree_with_the_paths():
    "Lengths and radial shares from lengths and angles alone are those of the tokens themselves."
    d, times = 6, torch.tensor([0., .3, 1.], dtype=torch.float64)
    z0, z1 = gauss(40, d, 1, 1), .8*gauss(40, d, 1, 1, seed=1)
    s0, s1 = sphere.project(z0), sphere.project(z1)
    r0, r1 = z0.norm(dim=1).flatten(), z1.norm(dim=1).flatten()
    profile = pair_profile(r0, r1, sphere.angle(z0, z1).flatten(), times, d)
    for name, path, ends in (('linear', LinearPath(), (z0, z1)), ('shell', ShellPath(), (z0, z1)),
                             ('slerp', SlerpPath(), (s0, s1))):
        length, radial, power = profile[name]
        curves = path_norms(path.interpolate, *ends, times)
        for k, t in enumerate(times):
            z, v = path.interpolate(*ends, t.expand(40))
            np.testing.assert_allclose(length[:, k], z.norm(dim=1).flatten(), rtol=1e-6)
            np.testing.assert_allclose(power[:, k], v.square().sum(1).flatten(), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(radial[:, k], ((z*v).sum(1)/z.norm(dim=1)).flatten(), atol=1e-6)
            assert curves['mean'][k].item() == pytest.approx(z.norm(dim=1).mean().item())
            assert curves['std'][k].item() == pytest.approx(z.norm(dim=1).numpy().std(), abs=1e-6)
            assert curves['radial_share'][k].item() == pytest.approx(radial_share(z, v), abs=1e-9)


def test_streamed_token_statistics_by_hand():
    z, times = .8*gauss(60, 8, 2, 2).float(), torch.tensor([0., .5, 1.])
    whole = TokenStatistics(8, times).update(z)
    parts = TokenStatistics(8, times)
    for x in z.split(17): parts.update(x)
    out = whole.summary()
    r = np.sqrt((z.double().numpy()**2).sum(1))
    assert out['mean_over_sqrt_d'] == pytest.approx(r.mean()/math.sqrt(8))
    assert out['cv'] == pytest.approx(r.std()/r.mean())
    assert out['images'] == 60 and out['count'] == 240
    assert out['gaussian_mean_over_sqrt_d'] == pytest.approx(stats.chi.mean(8)/math.sqrt(8))
    assert out['gaussian_cv'] == pytest.approx(stats.chi.std(8)/stats.chi.mean(8))
    assert parts.summary()['mean'] == pytest.approx(out['mean'])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(z.shape, generator=generator)
    for name, path, ends in (('linear', LinearPath(), (noise, z)), ('shell', ShellPath(), (noise, z)),
                             ('slerp', SlerpPath(), (sphere.project(noise), sphere.project(z)))):
        want = path_norms(path.interpolate, *ends, times)
        found = out['paths'][name]
        np.testing.assert_allclose(found['mean_over_sqrt_d'], want['mean']/math.sqrt(8), atol=1e-4)
        np.testing.assert_allclose(found['radial_share'], want['radial_share'], atol=1e-4)
    edges, density = whole.density()
    assert np.sum(density*np.diff(edges)) == pytest.approx(1)
    assert edges[0] <= r.min()/math.sqrt(8)
    assert edges[-1] >= r.max()/math.sqrt(8)
    middle = path_norms(LinearPath().interpolate, noise, z, times)['mean']
    shells = [(x.mean(), x.std()) for x in (noise.double().norm(dim=1).numpy(), r)]
    assert out['excursion_sigma'] == pytest.approx(max(min(abs(m - a)/s for a, s in shells) for m in middle.tolist()),
                                                   rel=1e-3)
    row = geometry_row('x', out | {'cv': .5}, out)
    assert row['raw_cv'] == .5
    assert row['cv'] == out['cv']
    assert row['share_t0'] == out['paths']['linear']['radial_share'][0]
    assert row['share_middle'] == out['paths']['linear']['radial_share'][1]
    assert row['share_t1'] == out['paths']['linear']['radial_share'][2]


def test_merged_token_statistics_are_those_of_all():
    z, times = gauss(40, 6, 2, 2).float(), torch.tensor([0., 1.])
    both = TokenStatistics(6, times).update(z[:30]).merge(TokenStatistics(6, times, seed=1).update(z[30:]))
    alone = TokenStatistics(6, times).update(z)
    assert both.summary()['mean'] == pytest.approx(alone.summary()['mean']) and both.summary()['images'] == 40
    assert both.density()[1].tolist() == alone.density()[1].tolist()
    apart = [TokenStatistics(6, times).update(z[:30]), TokenStatistics(6, times, seed=1).update(z[30:])]
    for p in ('linear', 'shell'):
        want = sum(s._radial[p] for s in apart)/sum(s._power[p] for s in apart)
        torch.testing.assert_close(both.share(p), want)


# ---- sphere and paths

def test_the_sphere_on_a_plane_by_hand():
    "Everything in two dimensions, where the sphere of radius 5 is a circle."
    z, w = torch.tensor([[3., 4.]]), torch.tensor([[-4., 3.]])
    torch.testing.assert_close(sphere.project(2*z, 5.), z)
    torch.testing.assert_close(sphere.project(z), z*math.sqrt(2)/5)
    torch.testing.assert_close(sphere.tangent(z, torch.tensor([[5., 5.]])), torch.tensor([[5 - 35/25*3, 5 - 35/25*4]]))
    assert sphere.angle(z, w).item() == pytest.approx(math.pi/2)
    torch.testing.assert_close(sphere.exp_map(z, w*math.pi/2), w, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sphere.exp_map(z, w/5), math.cos(.2)*z + math.sin(.2)*w)
    torch.testing.assert_close(sphere.log_map(z, w), w*math.pi/2)
    torch.testing.assert_close(sphere.slerp(z, w, 1/3), math.cos(math.pi/6)*z + math.sin(math.pi/6)*w)
    torch.testing.assert_close(sphere.slerp_velocity(z, w, 1/3),
                               math.pi/2*(-math.sin(math.pi/6)*z + math.cos(math.pi/6)*w))
    torch.testing.assert_close(sphere.transport(z, w, w), -z)
    assert concentration.token_norm(z).item() == 5.


def test_uniform_points_are_uniform():
    z = sphere.sample_sphere((20_000, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.norm(dim=1), torch.full((20_000,), math.sqrt(3)))
    # Archimedes
    for k in range(3): assert stats.kstest(z[:, k].numpy()/math.sqrt(3), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize('arm', list(ARMS))
def test_a_step_by_hand(arm):
    path, z, v = ARMS[arm], gauss(2, 4, 1, 1), gauss(2, 4, 1, 1, seed=1)
    if arm != 'spherical-slerp':
        torch.testing.assert_close(path.step(z, v, .3), z + .3*v)
        assert torch.equal(path.tangent(z, v), v)
        return
    z = sphere.project(z)
    u = v - (v*z).sum(1, keepdim=True)/4*z
    n = .3*u.norm(dim=1, keepdim=True)/2
    torch.testing.assert_close(path.tangent(z, v), u)
    torch.testing.assert_close(path.step(z, v, .3), torch.cos(n)*z + torch.sin(n)*2*u/u.norm(dim=1, keepdim=True))
    straight = z + .3*v
    torch.testing.assert_close(SlerpPath(exponential=False).step(z, v, .3),
                               2*straight/straight.norm(dim=1, keepdim=True))
    assert torch.equal(SlerpPath(project_velocity=False).tangent(z, v), v)


def test_arms_are_what_they_are_called():
    assert {arm: repr(p) for arm, p in ARMS.items()} == {
        'vanilla-linear': 'LinearPath(spherical=False)', 'vanilla-shell': 'ShellPath()',
        'spherical-linear': 'LinearPath(spherical=True)',
        'spherical-slerp': 'SlerpPath(project_velocity=True, exponential=True)'}
    assert repr(arm_path('spherical-slerp', False, True)) == 'SlerpPath(project_velocity=False, exponential=True)'
    assert repr(arm_path('spherical-slerp', True, False)) == 'SlerpPath(project_velocity=True, exponential=False)'
    for arm, path in ARMS.items():
        prior = path.prior((2, 4, 1, 1), torch.Generator().manual_seed(3))
        plain = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(prior, 2*plain/plain.norm(dim=1, keepdim=True) if 'spherical' in arm else plain)


@pytest.mark.parametrize('radius, cv', [(1., .15), (1., .4), (.35, .23)])
def test_the_excursion_that_norms_alone_expect(radius, cv):
    "That of isotropic tokens in many dimensions; for equal radii (1 - 1/√2)/CV, where the path's own spread is small."
    d = 256
    z0, z1 = isotropic_pair(d, radius, cv, 500)
    shells = [(norm_stats(z)['mean'], norm_stats(z)['std']) for z in (z0, z1)]
    times = torch.linspace(0, 1, 65, dtype=torch.float64)
    walked = path_norms(LinearPath().interpolate, z0, z1, times)
    assert expected_excursion(*shells) == pytest.approx(off_shell_distance(walked['mean'], shells), rel=.05)
    if radius == 1.: assert expected_excursion((1., .01), (1., cv)) == pytest.approx((1 - .5**.5)/cv, rel=.1)


def test_the_rule_of_thumb_names_its_number():
    thick, thin = ({'d': 32, 'mean_over_sqrt_d': .99, 'cv': cv} for cv in (.4, .12))
    assert rule_of_thumb(thick).startswith('0.7 σ by its norms alone') and 'hardly a shell' in rule_of_thumb(thick)
    assert rule_of_thumb(thin).startswith('2.3 σ by its norms alone') and 'leaves this shell' in rule_of_thumb(thin)
