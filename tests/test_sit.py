"""SiT against an independent implementation from the published names, and its shapes."""
import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from spherical_lfm.sit import SiT, sincos_positions


def published_velocity(w: dict, z, t, y, heads: int):
    "SiT's forward pass with plain operations on a published state dict; the second half of the channels is dropped."
    width, c, p, _ = w['x_embedder.proj.weight'].shape
    B, _, side, _ = z.shape
    n = side//p
    patches = z.reshape(B, c, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(B, n*n, c*p*p)
    x = patches @ w['x_embedder.proj.weight'].reshape(width, -1).T + w['x_embedder.proj.bias'] + w['pos_embed']
    omega = torch.exp(-math.log(10000)*torch.arange(128)/128)
    waves = torch.cat([torch.cos(t[:, None]*omega), torch.sin(t[:, None]*omega)], 1)
    linear = lambda x, name: x @ w[f'{name}.weight'].T + w[f'{name}.bias']
    silu = lambda x: x*torch.sigmoid(x)
    cond = linear(silu(linear(waves, 't_embedder.mlp.0')),
                  't_embedder.mlp.2') + w['y_embedder.embedding_table.weight'][y]
    norm = lambda x: (x - x.mean(-1, keepdim=True))/torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)
    for i in range(1 + max(int(k.split('.')[1]) for k in w if k.startswith('blocks.'))):
        b = f'blocks.{i}'
        s1, c1, g1, s2, c2, g2 = linear(silu(cond), f'{b}.adaLN_modulation.1')[:, None].chunk(6, -1)
        q, k, v = linear(norm(x)*(1 + c1) + s1, f'{b}.attn.qkv').reshape(B, n*n, 3, heads,
                                                                         width//heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2)/math.sqrt(width/heads), -1) @ v
        x = x + g1*linear(attention.transpose(1, 2).reshape(B, n*n, width), f'{b}.attn.proj')
        hidden = linear(norm(x)*(1 + c2) + s2, f'{b}.mlp.fc1')
        gelu = .5*hidden*(1 + torch.tanh(math.sqrt(2/math.pi)*(hidden + .044715*hidden**3)))
        x = x + g2*linear(gelu, f'{b}.mlp.fc2')
    shift, scale = linear(silu(cond), 'final_layer.adaLN_modulation.1')[:, None].chunk(2, -1)
    out = linear(norm(x)*(1 + scale) + shift, 'final_layer.linear')
    image = torch.einsum('nhwpqc->nchpwq', out.reshape(B, n, n, p, p, -1)).reshape(B, -1, side, side)
    return image[:, :c]


def random_weights(seed=0, **kwargs):
    "A model with no closed gate, and inputs for it."
    g = torch.Generator().manual_seed(seed)
    model = SiT(**dict(input_size=8, patch_size=2, in_channels=4, hidden_size=96, depth=3, num_heads=6, num_classes=7)
                | kwargs).requires_grad_(False).eval()
    for p in model.parameters(): p += .05*torch.randn(p.shape, generator=g)
    return model, (torch.randn(5, 4, 8, 8, generator=g), torch.rand(5, generator=g), torch.tensor([0, 1, 6, 7, 3]))


@pytest.mark.parametrize('patch', [1, 2, 4])
@pytest.mark.parametrize('learn_sigma', [False, True])
def test_published_arithmetic(patch, learn_sigma):
    model, (z, t, y) = random_weights(patch_size=patch, learn_sigma=learn_sigma)
    state = model.state_dict()
    want = published_velocity(state, z, t, y, heads=6)
    torch.testing.assert_close(model(z, t, y), want, atol=1e-5, rtol=1e-5)
    converted = SiT.from_sit_checkpoint(state, num_heads=6).requires_grad_(False)
    torch.testing.assert_close(converted(z, t, y), want, atol=1e-5, rtol=1e-5)
    reverse = SiT.from_sit_checkpoint(state, reverse_time=True, num_heads=6).requires_grad_(False)
    torch.testing.assert_close(reverse(z, t, y), -published_velocity(state, z, 1 - t, y, heads=6), atol=1e-5, rtol=1e-5)


def test_checkpoint_files(tmp_path):
    model, (z, t, y) = random_weights()
    heads = {'projectors.0.0.weight': torch.zeros(2, 2)}
    torch.save({'ema': model.state_dict() | heads, 'args': argparse.Namespace(model='SiT')}, tmp_path/'sit.pt')
    torch.testing.assert_close(SiT.from_sit_checkpoint(tmp_path/'sit.pt', num_heads=6)(z, t, y), model(z, t, y))
    torch.save({'model': model.state_dict(), 'args': pytest.Item}, tmp_path/'evil.pt')
    with pytest.raises(ValueError, match='holds more than tensors .*Item.*save its state dict alone'):
        SiT.from_sit_checkpoint(tmp_path/'evil.pt')
    with pytest.raises(FileNotFoundError, match='no checkpoint'): SiT.from_sit_checkpoint(tmp_path/'none.pt')
    state = model.state_dict()
    del state['blocks.1.mlp.fc2.bias']
    with pytest.raises(ValueError, match='blocks.1.mlp.fc2.bias'): SiT.from_sit_checkpoint(state, num_heads=6)


def test_heads_of_a_published_size_are_known():
    for name, heads in (('SiT-Ti/2', 4), ('SiT-S/2', 6)):
        small = SiT.from_name(name, input_size=4, depth=1)
        found = SiT.from_sit_checkpoint(small.state_dict())
        assert found.config.num_heads == heads == small.config.num_heads


def test_positions_are_those_of_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
    want = torch.as_tensor(get_2d_sincos_pos_embed(24, 5, base_size=5, output_type='pt')).float()
    torch.testing.assert_close(sincos_positions(24, 5)[0], want)


def test_a_published_checkpoint_gives_its_average():
    average, raw = random_weights()[0].state_dict(), random_weights(seed=1)[0].state_dict()
    found = SiT.from_sit_checkpoint({'model': raw, 'ema': average}, num_heads=6).state_dict()
    assert all(torch.equal(found[k], average[k]) for k in found)
    assert any(not torch.equal(found[k], raw[k]) for k in found)


def test_gradient_checkpointing_and_compile_change_nothing():
    model, (z, t, y) = random_weights()
    model.requires_grad_(True)
    loss = lambda m: m(z, t, y).square().mean()
    plain = torch.autograd.grad(loss(model), model.blocks[0].mlp.fc1.weight)[0]
    torch.testing.assert_close(loss(torch.compile(model)), loss(model))
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(loss(model), model.blocks[0].mlp.fc1.weight)[0], plain)


def test_initialisation():
    model = SiT.from_name('SiT-Ti/2', input_size=8)
    for block in model.blocks: assert not block.adaLN_modulation[1].weight.any()
    assert not model.final_layer.linear.weight.any()
    qkv = model.blocks[0].attn.qkv.weight
    assert abs(qkv.abs().max().item() - math.sqrt(6/(qkv.shape[0] + qkv.shape[1]))) < 1e-3
    assert abs(model.t_embedder.mlp[0].weight.std().item() - .02) < 2e-3
    assert F.cosine_similarity(model.pos_embed[0, 0], model.pos_embed[0, 1],
                               0) > F.cosine_similarity(model.pos_embed[0, 0], model.pos_embed[0, 15], 0)
