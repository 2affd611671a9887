"""Geometry against high-precision oracles, random inputs, compilers and half precision."""
import math

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spherical_lfm.concentration import token_norm
from spherical_lfm.sphere import (
    angle,
    exp_map,
    geodesic,
    log_map,
    project,
    sample_sphere,
    slerp,
    slerp_velocity,
    tangent,
    transport,
)

ANGLES = [1e-7, 1e-5, 1e-3, .1, 1., 1.5, 2.5, 3., 3.1, math.pi - 1e-2, math.pi - 1e-3]
DIMS = [2, 3, 16, 32, 257, 4096]


def pair(theta: float, d: int, dtype, count: int = 8):
    "Pairs at an angle, rounded to `dtype`; one row per pair."
    g = torch.Generator().manual_seed(d)
    a = project(torch.randn(count, d, generator=g, dtype=torch.float64))
    b = project(tangent(a, torch.randn(count, d, generator=g, dtype=torch.float64)))
    return a.to(dtype), (math.cos(theta)*a + math.sin(theta)*b).to(dtype)


class Oracle:
    "Textbook formulas in 60 digits for one pair of rounded tokens."
    def __init__(self, z0, z1):
        mpmath.mp.dps = 60
        self.a, self.b = ([mpmath.mpf(x) for x in z.double().tolist()] for z in (z0, z1))
        dot = lambda x, y: mpmath.fsum(p*q for p, q in zip(x, y))
        self.dot = dot
        self.theta = mpmath.acos(dot(self.a, self.b)/mpmath.sqrt(dot(self.a, self.a)*dot(self.b, self.b)))
        self.radius = mpmath.sqrt(dot(self.a, self.a))

    def mix(self, x, y): return torch.tensor([float(x*p + y*q) for p, q in zip(self.a, self.b)], dtype=torch.float64)
    def slerp(self, t): s = mpmath.sin(self.theta); return self.mix(mpmath.sin((1 - t)*self.theta)/s, mpmath.sin(t*self.theta)/s)
    def velocity(self, t): s = self.theta/mpmath.sin(self.theta); return self.mix(-s*mpmath.cos((1 - t)*self.theta), s*mpmath.cos(t*self.theta))

    def exp(self, u):
        u = [mpmath.mpf(x) for x in u.double().tolist()]
        n = mpmath.sqrt(self.dot(u, u))
        c, s = mpmath.cos(n/self.radius), mpmath.sin(n/self.radius)*self.radius/n
        return torch.tensor([float(c*p + s*q) for p, q in zip(self.a, u)], dtype=torch.float64)

    def transport(self, v):
        v = [mpmath.mpf(x) for x in v.double().tolist()]
        # of the directions: rounding makes the two lengths differ, and the formula for equal lengths would magnify that by 1/(π - θ)²
        ra, rb = self.radius, mpmath.sqrt(self.dot(self.b, self.b))
        a, b = [x/ra for x in self.a], [x/rb for x in self.b]
        f = self.dot(v, b)/(1 + self.dot(a, b))
        return torch.tensor([float(x - f*(p + q)) for x, p, q in zip(v, a, b)], dtype=torch.float64)


@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize('d', DIMS)
@pytest.mark.parametrize('theta', ANGLES)
def test_against_oracle(theta, d, dtype, tolerance):
    z0, z1 = pair(theta, d, dtype, count=1 if d > 1000 else 3)
    allowed = tolerance if theta <= 3. else tolerance*math.sin(3.)/math.sin(theta)
    g = torch.Generator().manual_seed(1)
    for a, b in zip(z0, z1):
        oracle, R = Oracle(a, b), math.sqrt(d)
        v = tangent(a, torch.randn(d, generator=g, dtype=torch.float64).to(dtype), dim=0)
        found = {
            'slerp': (slerp(a, b, .3, dim=0), oracle.slerp(mpmath.mpf(.3))),
            'velocity': (slerp_velocity(a, b, .8, dim=0), oracle.velocity(mpmath.mpf(.8))),
            'log_map': (log_map(a, b, dim=0), oracle.velocity(mpmath.mpf(0))),
            'exp_map': (exp_map(a, v, dim=0), oracle.exp(v)),
            'transport': (transport(a, b, v, dim=0), oracle.transport(v)),
        }
        for name, (got, want) in found.items():
            error = (got.double() - want).norm().item()/R
            assert error <= allowed, f'{name} at angle {theta}, d={d}: {error:.1e} > {allowed:.1e}'


@pytest.mark.parametrize('d', [2, 16, 1024])
@pytest.mark.parametrize('theta', ANGLES)
def test_identities(theta, d):
    z, w = pair(theta, d, torch.float64)
    slack = 1e-13*max(1, 1/math.sin(theta))
    assert (exp_map(z, log_map(z, w)) - w).norm(dim=1).max() <= 10*slack*math.sqrt(d)
    for t in (0., .25, 1.): assert (token_norm(slerp(z, w, t))/math.sqrt(d) - 1).abs().max() <= slack
    assert (angle(z, w) - theta).abs().max() <= 10*slack


def numbers(d): return st.lists(st.floats(-1e3, 1e3, width=32), min_size=d, max_size=d)

@settings(max_examples=150, deadline=None)
@example(([0., 0.], [0., 1.401298464324817e-45], [0., 0.]), 0.)
@given(st.integers(2, 9).flatmap(lambda d: st.tuples(numbers(d), numbers(d), numbers(d))), st.floats(0, 1))
def test_always_finite_on_the_sphere_and_tangent(vectors, t):
    a, b, c = (torch.tensor([v], requires_grad=True) for v in vectors)
    z, w = project(a), project(b)
    R = math.sqrt(z.shape[1])
    z_t, v_t = geodesic(z, w, t)
    moved, carried = exp_map(z, tangent(z, c)), transport(z, w, tangent(z, c))
    everything = [z, w, z_t, v_t, moved, carried, log_map(z, w), angle(z, w)]
    grads = torch.autograd.grad(sum(x.sum() for x in everything), (a, b, c))
    for x in (*everything, *grads): assert torch.isfinite(x).all()
    for x in (z, w, z_t): assert abs(token_norm(x).item()/R - 1) < 1e-5
    assert abs(token_norm(v_t).item() - R*angle(z, w).item()) < 1e-4*R


@pytest.mark.parametrize('other', [1., -1.])
def test_equal_and_antipodal_tokens(other):
    for first in ([1., 2., 2.], [3., 0., 0.], [0., 0., 3.]):
        z = torch.tensor([first], requires_grad=True)
        for t in (0., .3, .5, 1.):
            z_t, v_t = geodesic(z, other*z.detach(), t)
            grad, = torch.autograd.grad((z_t + v_t).sum(), z)
            assert torch.isfinite(torch.cat([z_t, v_t, grad])).all()
            assert abs(token_norm(z_t).item() - 3) < 1e-5
        torch.testing.assert_close(slerp(z, other*z, 0.), z, atol=1e-5, rtol=0)
        torch.testing.assert_close(slerp(z, other*z, 1.), other*z, atol=1e-5, rtol=0)
        torch.testing.assert_close(slerp(z, -z, .5), slerp(z, -z, .5))


def test_zero_velocity_and_zero_token():
    z, u = project(torch.randn(4, 8)), torch.zeros(4, 8, requires_grad=True)
    out = exp_map(z, u)
    grad, = torch.autograd.grad(out.sum(), u)
    assert torch.equal(out, z) and torch.isfinite(grad).all()
    assert torch.equal(project(torch.zeros(1, 4)), torch.tensor([[2., 0., 0., 0.]]))
    assert torch.isfinite(geodesic(torch.zeros(1, 4), torch.zeros(1, 4), .5)[0]).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside(dtype):
    z, w = (x.to(dtype) for x in pair(1., 32, torch.float64))
    for f in (lambda a, b: slerp(a, b, .3), log_map, exp_map, tangent, lambda a, b: transport(a, b, log_map(a, b)), lambda a, b: project(a)):
        assert f(z, w).dtype == dtype
    assert torch.equal(slerp(z, w, .3), slerp(z.float(), w.float(), .3).to(dtype))
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(slerp(z.float(), w.float(), .3), slerp(z.float(), w.float(), .3).float())


FUNCTIONS = {
    'project': lambda z, w, t: project(z), 'tangent': lambda z, w, t: tangent(z, w), 'angle': lambda z, w, t: angle(z, w), 'geodesic': geodesic,
    'exp_map': lambda z, w, t: exp_map(z, tangent(z, w)), 'log_map': lambda z, w, t: log_map(z, w), 'transport': lambda z, w, t: transport(z, w, tangent(z, w)),
}

@pytest.mark.parametrize('name', FUNCTIONS)
def test_compile_and_vmap(name):
    f, z, w = FUNCTIONS[name], sample_sphere((6, 16, 2, 2)), sample_sphere((6, 16, 2, 2))
    w[0], w[1] = z[0], -z[1]
    t = torch.linspace(0, 1, 6)
    want = f(z, w, t)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(z, w, t), want, atol=2e-5, rtol=1e-4)
    single = torch.func.vmap(lambda a, b, s: f(a[None], b[None], s))(z, w, t)
    strip = lambda x: x[:, 0]
    torch.testing.assert_close(tuple(map(strip, single)) if isinstance(single, tuple) else strip(single), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('call,words', [
    (lambda: project(torch.zeros(3, 1)), 'at least 2 channels'), (lambda: project(torch.ones(3, 4), radius=0), 'radius must be positive'),
    (lambda: project(torch.ones(3, 4), dim=2), 'names no axis'), (lambda: slerp(torch.ones(2, 4), torch.ones(3, 4), .5), 'one shape'),
    (lambda: slerp(torch.ones(2, 4), torch.ones(2, 4), torch.zeros(3)), 'one per sample'),
])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words): call()
    with pytest.raises(TypeError, match='floating point'): project(torch.ones(3, 4, dtype=torch.int32))
