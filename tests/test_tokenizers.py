"""Every tokenizer format at full size with random weights, real weights where they are at hand, and pictures as people have them."""
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from forked import call
from PIL import Image
from safetensors.torch import load_file, save_file

from spherical_lfm import tokenizers as tk
from spherical_lfm.concentration import token_norm
from spherical_lfm.engine import images as images_module
from spherical_lfm.engine import weights as weights_module
from spherical_lfm.engine.features import psnr
from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.weights import AutoencoderTAEF2, convert_ldm_autoencoder
from spherical_lfm.sampling import tokenizer_for
from spherical_lfm.tokenizers import load_tokenizer, with_statistics
from spherical_lfm.tools.plan import bare_tokenizer
from spherical_lfm.tools.studies import Analysis, analyze_tokens

BIN = Path(sys.executable).parent
SHARED = Path(__file__).resolve().parent.parent.parent/'shared'
real = pytest.mark.skipif(not (SHARED/'weights').exists(), reason='needs the TAEF2 weights and sample photographs beside the checkout')
ENV = os.environ | {'OMP_NUM_THREADS': '1'}


def start(*args): return subprocess.run([str(BIN/args[0]), *map(str, args[1:])], capture_output=True, text=True, timeout=300, env=ENV)


# --- the published autoencoders, full size ---

def random_state(model, seed=0):
    "Random weights that keep activations in range."
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters(): p.data = torch.randn(p.shape, generator=g)*(.02 if p.ndim > 1 else .1) + (1. if p.ndim == 1 and 'norm' in name and 'weight' in name else 0.)
    return model

def save_sd(folder):
    diffusers.AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                            latent_channels=4, sample_size=256).save_pretrained(folder)

def save_flux1(folder):
    diffusers.AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                            sample_size=1024, scaling_factor=.3611, shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False).save_pretrained(folder)

def save_flux2(folder):
    model = diffusers.AutoencoderKLFlux2()
    model.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    model.bn.running_var.uniform_(.5, 2, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder/'vae')

def ldm_state():
    "A full-size VA-VAE checkpoint under its published names, made from the shapes of the architecture alone."
    g, state = torch.Generator().manual_seed(0), {}
    def layer(name, *shape):
        state[f'{name}.weight'] = torch.randn(shape, generator=g)/math.prod(shape[1:])**.5
        state[f'{name}.bias'] = torch.randn(shape[0], generator=g)*.05
    def norm(name, c): state[f'{name}.weight'], state[f'{name}.bias'] = 1 + .1*torch.randn(c, generator=g), .1*torch.randn(c, generator=g)
    def block(name, i, o):
        norm(f'{name}.norm1', i); layer(f'{name}.conv1', o, i, 3, 3); norm(f'{name}.norm2', o); layer(f'{name}.conv2', o, o, 3, 3)
        if i != o: layer(f'{name}.nin_shortcut', o, i, 1, 1)
    def attention(name, c):
        norm(f'{name}.norm', c)
        for part in ('q', 'k', 'v', 'proj_out'): layer(f'{name}.{part}', c, c, 1, 1)
    widths = [128*m for m in (1, 1, 2, 2, 4)]
    layer('encoder.conv_in', 128, 3, 3, 3)
    c = 128
    for level, w in enumerate(widths):
        for n in range(2):
            block(f'encoder.down.{level}.block.{n}', c, w); c = w
            if level == 4: attention(f'encoder.down.{level}.attn.{n}', c)
        if level < 4: layer(f'encoder.down.{level}.downsample.conv', c, c, 3, 3)
    for side in ('encoder', 'decoder'):
        block(f'{side}.mid.block_1', 512, 512); attention(f'{side}.mid.attn_1', 512); block(f'{side}.mid.block_2', 512, 512)
    norm('encoder.norm_out', 512); layer('encoder.conv_out', 64, 512, 3, 3)
    layer('quant_conv', 64, 64, 1, 1); layer('post_quant_conv', 32, 32, 1, 1); layer('decoder.conv_in', 512, 32, 3, 3)
    c = 512
    for level in reversed(range(5)):
        for n in range(3):
            block(f'decoder.up.{level}.block.{n}', c, widths[level]); c = widths[level]
            if level == 4: attention(f'decoder.up.{level}.attn.{n}', c)
        if level: layer(f'decoder.up.{level}.upsample.conv', c, c, 3, 3)
    norm('decoder.norm_out', 128); layer('decoder.conv_out', 3, 128, 3, 3)
    return state

def save_vavae(folder):
    folder.mkdir()
    extra = {'linear_proj.weight': torch.zeros(32, 1024, 1, 1), 'loss.logvar': torch.zeros(()), 'loss.discriminator.main.0.weight': torch.zeros(4, 3, 4, 4)}
    torch.save({'state_dict': ldm_state() | extra}, folder/'vavae-imagenet256-f16d32-dinov2.pt')
    torch.save({'mean': torch.linspace(-1, 1, 32).view(1, 32, 1, 1), 'std': torch.linspace(.5, 2, 32).view(1, 32, 1, 1)}, folder/'latents_stats.pt')

def save_taef2(folder):
    folder.mkdir()
    model = random_state(AutoencoderTAEF2())
    for half in ('encoder', 'decoder'): save_file({k: v.half() for k, v in getattr(model, half).state_dict().items()}, folder/f'taef2_{half}.safetensors')

def save_taesd(name, channels, folder):
    "As published: the decoder's clamp takes the number 0, so its layers begin at 1."
    folder.mkdir()
    model = random_state(diffusers.AutoencoderTiny(latent_channels=channels))
    for half, first in (('encoder', 0), ('decoder', 1)):
        numbered = ((*k.split('.', 1), v) for k, v in getattr(model, half).layers.state_dict().items())
        save_file({f'{int(k) + first}.{rest}': v.bfloat16() for k, rest, v in numbered}, folder/f'{name}_{half}.safetensors')
    return model

TAESD = {'taesd': 4, 'taesdxl': 4, 'taesd3': 16, 'taef1': 16}

FULL = { # name: (writer, millions of parameters, shape at 256 px, raw shape at 64 px)
    'sd': (save_sd, 83.65, (4, 32, 32), (4, 8, 8)), 'repae-flux1': (save_flux1, 83.82, (16, 32, 32), (16, 8, 8)), 'flux2': (save_flux2, 84.05, (32, 32, 32), (32, 8, 8)),
    'vavae': (save_vavae, 69.84, (32, 16, 16), (32, 4, 4)), 'taef2': (save_taef2, 2.68, (32, 32, 32), (32, 8, 8)),
    **{name: (partial(save_taesd, name, d), 2.445 if d == 4 else 2.459, (d, 32, 32), (d, 8, 8)) for name, d in TAESD.items()},
}

@pytest.mark.parametrize('name', FULL)
def test_published_formats_at_full_size(name, tmp_path):
    write, millions, shape, raw_shape = FULL[name]
    write(tmp_path/name)
    t = load_tokenizer(tmp_path/name)
    assert sum(p.numel() for p in t.autoencoder.parameters())/1e6 == pytest.approx(millions, abs=.01)
    assert t.latent_shape(256, 256) == shape
    with torch.device('meta'): twin = type(t.autoencoder).from_config(t.autoencoder.config).eval()
    out = twin.encode(torch.zeros(1, 3, 256, 256, device='meta'))
    assert tuple((out.latent_dist.mode() if hasattr(out, 'latent_dist') else out[0]).shape[1:]) == (shape if t.transform.stride == 1 else raw_shape)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))*2 - 1
    with torch.no_grad():
        raw, z = t.raw_latents(x), t.encode(x)
        assert raw.shape[1:] == raw_shape and z.dtype == torch.float32 and torch.isfinite(z).all()
        torch.testing.assert_close(t.transform.inverse(t.transform(raw)), raw, atol=1e-5, rtol=1e-5)
        assert t.decode(z).shape == x.shape
    assert 1 <= t.images_that_fit(256, 256) < 10_000
    if name == 'flux2':
        packed = load_tokenizer(tmp_path/name, packed=True)
        assert packed.latent_shape(256, 256) == (128, 16, 16) and packed.downsample == 16
        with torch.no_grad(): torch.testing.assert_close(F.pixel_unshuffle(z, 2), packed.encode(x), atol=1e-5, rtol=1e-5)
        want = (F.pixel_unshuffle(raw, 2) - t.autoencoder.bn.running_mean.view(1, -1, 1, 1))/(t.autoencoder.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
        torch.testing.assert_close(packed.transform(raw), want, atol=1e-5, rtol=1e-5)
    if name == 'repae-flux1': torch.testing.assert_close(z, (raw - .1159)*.3611)
    if name == 'sd': torch.testing.assert_close(z, raw*.18215)


def ldm_oracle(w):
    "Encoder (to the posterior's mean) and decoder of a latent-diffusion autoencoder, from its own tensor names with plain operations."
    conv = lambda x, n, **k: F.conv2d(x, w[f'{n}.weight'], w[f'{n}.bias'], **k)
    norm = lambda x, n: F.group_norm(x, 32, w[f'{n}.weight'], w[f'{n}.bias'], 1e-6)
    act = lambda x: x*torch.sigmoid(x)
    def block(x, n):
        h = conv(act(norm(x, f'{n}.norm1')), f'{n}.conv1', padding=1)
        h = conv(act(norm(h, f'{n}.norm2')), f'{n}.conv2', padding=1)
        return h + (conv(x, f'{n}.nin_shortcut') if f'{n}.nin_shortcut.weight' in w else x)
    def attend(x, n):
        q, k, v = (conv(norm(x, f'{n}.norm'), f'{n}.{p}').flatten(2) for p in 'qkv')
        weights = torch.softmax(q.mT @ k/q.shape[1]**.5, -1)
        return x + conv((v @ weights.mT).view_as(x), f'{n}.proj_out')
    def middle(x, side): return block(attend(block(x, f'{side}.mid.block_1'), f'{side}.mid.attn_1'), f'{side}.mid.block_2')
    def encode(x):
        h = conv(x, 'encoder.conv_in', padding=1)
        for level in range(5):
            for n in range(2):
                h = block(h, f'encoder.down.{level}.block.{n}')
                if level == 4: h = attend(h, f'encoder.down.{level}.attn.{n}')
            if level < 4: h = conv(F.pad(h, (0, 1, 0, 1)), f'encoder.down.{level}.downsample.conv', stride=2)
        return conv(conv(act(norm(middle(h, 'encoder'), 'encoder.norm_out')), 'encoder.conv_out', padding=1), 'quant_conv')[:, :32]
    def decode(z):
        h = middle(conv(conv(z, 'post_quant_conv'), 'decoder.conv_in', padding=1), 'decoder')
        for level in reversed(range(5)):
            for n in range(3):
                h = block(h, f'decoder.up.{level}.block.{n}')
                if level == 4: h = attend(h, f'decoder.up.{level}.attn.{n}')
            if level: h = conv(F.interpolate(h, scale_factor=2.), f'decoder.up.{level}.upsample.conv', padding=1)
        return conv(act(norm(h, 'decoder.norm_out')), 'decoder.conv_out', padding=1)
    return encode, decode

@torch.no_grad()
def test_converted_checkpoint_computes_what_the_original_does():
    state = ldm_state()
    model = diffusers.AutoencoderKL(**weights_module.VAVAE_CONFIG).eval()
    model.load_state_dict(convert_ldm_autoencoder(state))
    encode, decode = ldm_oracle(state)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))*2 - 1
    z = encode(x)
    assert z.std() > .01
    torch.testing.assert_close(model.encode(x).latent_dist.mode(), z, atol=1e-4*z.abs().max().item(), rtol=1e-3)
    y = decode(z)
    torch.testing.assert_close(model.decode(z).sample, y, atol=1e-4*y.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize('name', TAESD)
def test_the_taesd_family_is_what_diffusers_makes_of_it(name, tmp_path):
    "Layer for layer; and a decoder with a layer too few, or one of another member, is refused."
    model = save_taesd(name, TAESD[name], tmp_path/name)
    t = load_tokenizer(tmp_path/name)
    found = t.autoencoder.state_dict()
    assert t.name == name and found.keys() == model.state_dict().keys()
    for k, v in model.state_dict().items(): assert torch.equal(found[k], v.bfloat16().float()), k
    file = tmp_path/name/f'{name}_decoder.safetensors'
    state = load_file(file)
    save_file({k: v for k, v in state.items() if not k.startswith('3.')}, file)
    with pytest.raises(ValueError, match='do not fit AutoencoderTiny'): load_tokenizer(tmp_path/name)
    save_file(state | {'1.weight': torch.zeros(64, 8, 3, 3)}, file)
    with pytest.raises(ValueError, match='do not fit AutoencoderTiny'): load_tokenizer(tmp_path/name)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=file.name): load_tokenizer(tmp_path/name)


def test_a_folder_of_several_tokenizers_is_asked_for_one_by_file(tmp_path):
    "None is taken by chance, neither to load nor to plan; and the file that was given is what is remembered."
    for name in ('taesd', 'taesd3'): save_taesd(name, TAESD[name], tmp_path/name)
    both = tmp_path/'both'
    both.mkdir()
    for file in [*tmp_path.glob('taesd*/*')]: shutil.copy(file, both)
    for opened in (load_tokenizer, tk.made_for_sphere, lambda place: bare_tokenizer(str(place))):
        with pytest.raises(ValueError, match=r'holds the weights of taesd, taesd3: give the path of a file, such as .*both/taesd_encoder\.safetensors'): opened(both)
    for name, half in (('taesd', 'decoder'), ('taesd3', 'encoder')):
        file, alone = both/f'{name}_{half}.safetensors', load_tokenizer(tmp_path/name)
        found = load_tokenizer(file)
        assert (found.name, found.d, found.identity, found.place) == (name, TAESD[name], alone.identity, str(file))
        assert load_tokenizer(found.place).identity == alone.identity and bare_tokenizer(str(file)).d == TAESD[name]
    taesd3 = load_tokenizer(tmp_path/'taesd3')
    made_by = {'place': str(both), 'name': 'taesd3', 'latent_identity': taesd3.latent_identity, 'identity': taesd3.identity}
    assert tokenizer_for({'data': {'tokenizer': made_by}, 'config': {'arm': 'vanilla-linear'}}).name == 'taesd3', 'others came later'
    mixed = tmp_path/'mixed'
    tk.Tokenizer(taesd3.autoencoder, tk.LatentTransform(mean=[1.]*16, std=[2.]*16), True, 'mine').save_pretrained(mixed)
    save_taesd('taef1', 16, tmp_path/'taef1')
    for file in (tmp_path/'taef1').iterdir(): shutil.copy(file, mixed)
    assert load_tokenizer(mixed).name == 'mine' and tk.made_for_sphere(mixed)
    other = load_tokenizer(mixed/'taef1_decoder.safetensors')
    assert (other.name, other.spherical, other.for_sphere) == ('taef1', False, None) and other.transform.config == tk.LatentTransform().config
    assert not tk.made_for_sphere(mixed/'taef1_decoder.safetensors') and other.identity == load_tokenizer(tmp_path/'taef1').identity
    digits = load_tokenizer(tk.TOKENIZERS['digits']/'spherical'/'tokenizer.json')
    assert digits.identity == load_tokenizer('digits', spherical=True).identity, 'a file of any format'
    assert bare_tokenizer(str(tk.TOKENIZERS['digits']/'vanilla'/'config.json')).d == 16


def test_hub_names_load_from_the_cache(tmp_path):
    "What the hub's client leaves on disk is enough to load by name, without a network."
    def snapshot(repository):
        folder = tmp_path/'hub'/f'models--{repository.replace("/", "--")}'
        (folder/'refs').mkdir(parents=True)
        (folder/'refs'/'main').write_text('0'*40)
        (folder/'snapshots').mkdir()
        return folder/'snapshots'/('0'*40)
    save_taef2(snapshot('madebyollin/taef2'))
    diffusers.AutoencoderKL(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, norm_num_groups=4,
                            scaling_factor=.18215).save_pretrained(snapshot('stabilityai/sd-vae-ft-ema'))
    code = 'from spherical_lfm.tokenizers import load_tokenizer\nfor n in ("taef2", "sd"): t = load_tokenizer(n); print(t.name, t.d)\ntry: load_tokenizer("vavae")\nexcept FileNotFoundError as e: print(e)'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV | {'HF_HOME': str(tmp_path), 'HF_ENDPOINT': 'http://127.0.0.1:9'}, timeout=200)
    assert 'taef2 32\nsd 4\n' in result.stdout, result.stderr
    assert 'latents_stats.pt' in result.stdout and 'give its path' in result.stdout


# --- other autoencoders of diffusers ---

OTHERS = {
    'tiny': (lambda: diffusers.AutoencoderTiny(encoder_block_out_channels=(8,)*3, decoder_block_out_channels=(8,)*3, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)), 32, (4, 8, 8)),
    'dc': (lambda: diffusers.AutoencoderDC(latent_channels=8, encoder_block_types='ResBlock', decoder_block_types='ResBlock', encoder_block_out_channels=(8, 16, 32), decoder_block_out_channels=(8, 16, 32),
                                           encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ())), 32, (8, 8, 8)),
    'rae': (lambda: diffusers.AutoencoderRAE(encoder_type='dinov2', encoder_hidden_size=128, encoder_patch_size=14, encoder_num_hidden_layers=1, decoder_hidden_size=32, decoder_num_hidden_layers=1,
                                             decoder_num_attention_heads=2, decoder_intermediate_size=32, patch_size=16, encoder_input_size=56), 64, (128, 4, 4)),
    'statistics in the config': (lambda: diffusers.AutoencoderKL(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, norm_num_groups=4, scaling_factor=.5,
                                                                 latents_mean=[.1, .2, .3, .4], latents_std=[1., 2., 3., 4.]), 32, (4, 16, 16)),
}

@pytest.mark.parametrize('name', OTHERS)
def test_any_image_autoencoder_of_diffusers(name, tmp_path):
    make, side, shape = OTHERS[name]
    if name == 'rae': pytest.importorskip('transformers')
    make().save_pretrained(tmp_path/'model')
    t = load_tokenizer(tmp_path/'model', spherical=True)
    x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))*2 - 1
    with torch.no_grad(): z = t.encode(x)
    assert z.shape[1:] == shape == t.latent_shape(side, side)
    torch.testing.assert_close(token_norm(z), torch.full_like(token_norm(z), t.d**.5), atol=1e-4, rtol=0)
    with torch.no_grad(): assert t.decode(z).shape == x.shape
    if name == 'rae':
        with pytest.raises(ValueError, match='works at 64 x 64'): t.encode(torch.zeros(1, 3, 128, 128))
    if name == 'statistics in the config':
        raw = t.raw_latents(x)
        torch.testing.assert_close(t.transform(raw)[:, 1], (raw[:, 1] - .2)*.5/2)
    standard = with_statistics(load_tokenizer(tmp_path/'model'), Photos(x), 'measure', batch_size=2, progress=False)
    with torch.no_grad(): torch.testing.assert_close(standard.encode(x).std((0, 2, 3), unbiased=False), torch.ones(t.d), atol=1e-3, rtol=0)


class Photos:
    "A source of images in memory."
    source = 'memory'
    def __init__(self, images): self.images, self.skipped, self.size = images, [], images.shape[-1]
    def shuffled(self, seed): return None
    def batches(self, n, order=None, limit=None): return ((x, torch.zeros(len(x))) for x in self.images[:limit].split(n))


def test_video_autoencoders_and_misfits_are_refused(tmp_path):
    diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.]*4, latents_std=[1.]*4).save_pretrained(tmp_path/'video')
    with pytest.raises(ValueError, match='choose an image autoencoder'): load_tokenizer(tmp_path/'video')
    save_taef2(tmp_path/'taef2')
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), num_encoder_blocks=(1,), num_decoder_blocks=(1,)).save_pretrained(tmp_path/'tiny')
    with pytest.raises(ValueError, match='no packed statistics'): load_tokenizer(tmp_path/'tiny', packed=True)
    (tmp_path/'taef2'/'taef2_decoder.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='taef2_decoder.safetensors'): load_tokenizer(tmp_path/'taef2')
    save_taef2(tmp_path/'short')
    whole = (tmp_path/'short'/'taef2_encoder.safetensors').read_bytes()
    (tmp_path/'short'/'taef2_encoder.safetensors').write_bytes(whole[:5000])
    with pytest.raises(ValueError, match='taef2_encoder.safetensors is damaged'): load_tokenizer(tmp_path/'short')


def test_config_and_weights_that_disagree(tmp_path):
    "diffusers would start with random weights where tensors are missing; here that is an error that counts them."
    t = load_tokenizer('digits')
    t.autoencoder.save_pretrained(tmp_path/'vae')
    config = json.loads((tmp_path/'vae'/'config.json').read_text())
    (tmp_path/'vae'/'config.json').write_text(json.dumps(config | {'layers_per_block': 2}))
    with pytest.raises(ValueError, match=r'do not fit its config.json: \d+ missing'): load_tokenizer(tmp_path/'vae')


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    (tmp_path/'vavae').mkdir()
    for name in ('vavae-imagenet256-f16d32-dinov2.pt', 'latents_stats.pt'): torch.save({'state_dict': Evil()}, tmp_path/'vavae'/name)
    with pytest.raises(ValueError, match='more than tensors'): load_tokenizer(tmp_path/'vavae')
    assert not (tmp_path/'executed').exists()


# --- memory and precision ---

def test_batches_are_split_to_fit_and_give_the_same(monkeypatch):
    t, x = load_tokenizer('digits'), torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2 - 1
    whole = t.decode(t.encode(x))
    seen, encode = [], t.autoencoder.encode
    monkeypatch.setattr(t.autoencoder, 'encode', lambda x: (seen.append(len(x)), encode(x))[1])
    class Little: available = 2*7*t._bytes[16, 16]
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: Little)
    torch.testing.assert_close(t.decode(t.encode(x)), whole, atol=1e-5, rtol=0)
    assert max(seen) == 7 and sum(seen) == 40
    class None_: available = 0
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: None_)
    with pytest.warns(UserWarning, match='tiling is switched on'): assert t.images_that_fit(16, 16) == 1
    assert t.autoencoder.use_tiling
    with pytest.raises(ValueError, match='has no tiling'): tk.Tokenizer(AutoencoderTAEF2()).enable_tiling()


MEMORY = '''
import torch
from spherical_lfm.tools.bench import _peak_memory as peak
from spherical_lfm.engine.weights import AutoencoderTAEF2
from spherical_lfm.tokenizers import Tokenizer, _activation_bytes
t = Tokenizer(AutoencoderTAEF2().requires_grad_(False))
t.decode(t.encode(torch.zeros(1, 3, 64, 64)))
before = peak()
t.decode(t.encode(torch.zeros(4, 3, 256, 256)))
print((peak() - before)/4, _activation_bytes(t.autoencoder, 256, 256)/2**20)
'''

@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is in other units elsewhere')
def test_memory_of_an_image_is_judged_about_right():
    measured, estimated = map(float, subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True, env=ENV, timeout=120).stdout.split())
    assert estimated/2 < measured < 2*estimated


def test_tiling_and_slicing_decode_large_images(tmp_path):
    save_sd(tmp_path/'sd')
    t = load_tokenizer(tmp_path/'sd')
    t.autoencoder.tile_sample_min_size, t.autoencoder.tile_latent_min_size = 64, 8
    x = torch.rand(1, 3, 96, 128)*2 - 1
    with torch.no_grad():
        t.enable_slicing().enable_tiling()
        assert t.decode(t.encode(x)).shape == x.shape


# --- images as people have them ---

@pytest.fixture
def zoo(tmp_path):
    "A folder of two classes with every kind of image, and what cannot be read."
    folder = tmp_path/'zoo'
    g = torch.Generator().manual_seed(0)
    pixels = (torch.rand(40, 56, 4, generator=g)*255).byte().numpy()
    rgba = Image.fromarray(pixels, 'RGBA')
    (folder/'a').mkdir(parents=True), (folder/'b').mkdir()
    for mode in ('RGB', 'L', 'P', 'LA', 'RGBA', '1', 'I;16'):
        image = Image.fromarray((torch.rand(40, 56, generator=g)*65535).to(torch.int32).numpy().astype('uint16')) if mode == 'I;16' else rgba.convert(mode)
        image.save(folder/'a'/f'{mode.replace(";", "")}.png')
    rgba.convert('CMYK').save(folder/'b'/'cmyk.jpg')
    Image.new('RGB', (1, 1), 'red').save(folder/'b'/'one-pixel.png')
    Image.new('RGB', (9000, 50), 'blue').save(folder/'b'/'wide.png')
    Image.new('1', (20_000, 20_000)).save(folder/'b'/'huge.png') # 400 million pixels in a few kilobytes: a decompression bomb
    whole = (folder/'a'/'RGB.png').read_bytes()
    (folder/'b'/'truncated.png').write_bytes(whole[:len(whole)//2])
    (folder/'b'/'text.png').write_text('not an image')
    (folder/'b'/'empty.jpg').write_bytes(b'')
    return folder


def test_every_kind_of_image_is_read_or_named(zoo, tmp_path):
    source = ImageSource(zoo, 16)
    x, y = next(source.batches(64))
    assert len(x) == 10 and x.abs().max() <= 1 and torch.isfinite(x).all() and set(y.tolist()) == {0, 1}
    assert sorted(s.split(':')[0] for s in source.skipped) == ['empty.jpg', 'huge.png', 'text.png', 'truncated.png']
    result = call('slfm_analyze', 'digits', zoo, '--out', tmp_path/'out', '--size', 16)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path/'out'/'analysis.json').read_text())['digits']
    assert found['row']['images'] == 10 and found['protocol']['skipped'] == 4 and '4 images skipped' in result.stdout
    assert {f.name for f in (tmp_path/'out').iterdir()} == {'slfm.json', 'analysis.json', 'table.csv', 'geometry.png', 'geometry.svg'}
    with pytest.raises(ValueError, match='cannot be read: text.png'): source[[Path(r).name for r in source.listing.rows].index('text.png')]


def test_parquet_with_names_as_labels_and_files_that_are_not_parquet(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    def png(colour):
        b = io.BytesIO()
        Image.new('RGB', (20, 20), colour).save(b, 'png')
        return {'bytes': b.getvalue(), 'path': f'{colour}.png'}
    pq.write_table(pa.table({'image': [png('red'), png('blue'), png('lime')], 'label': ['plum', 'apple', 'plum']}), tmp_path/'named.parquet')
    assert [y for _, y in ImageSource(tmp_path/'named.parquet', 16)] == [1, 0, 1]
    pq.write_table(pa.table({'colour': [1]}), tmp_path/'other.parquet')
    with pytest.raises(ValueError, match='no column that holds images'): ImageSource(tmp_path/'other.parquet', 16)
    (tmp_path/'broken.parquet').write_bytes(b'PAR1 and nothing else')
    with pytest.raises(ValueError, match='no readable parquet file'): ImageSource(tmp_path/'broken.parquet', 16)


def test_one_bad_image_among_many(tmp_path):
    from spherical_lfm.tools.studies import analyze_study
    images, _ = images_module.digits_images('train')
    (tmp_path/'many').mkdir()
    for n, x in enumerate(images[:300]): Image.fromarray(((x[0] + 1)*127.5).byte().numpy()).save(tmp_path/'many'/f'{n:03d}.png')
    (tmp_path/'many'/'150.png').write_bytes(b'\x89PNG broken')
    found = analyze_study(load_tokenizer('digits'), ImageSource(tmp_path/'many', 16), tmp_path/'out', progress=False)['digits']
    assert found['row']['images'] == 299 and found['protocol']['skipped_first'] == ['150.png: UnidentifiedImageError']


def test_partners_where_one_class_is_alone(zoo, tmp_path):
    (zoo/'c').mkdir()
    Image.new('RGB', (30, 30), 'green').save(zoo/'c'/'alone.png')
    result = call('slfm_probe', 'digits', zoo, '--out', tmp_path/'out', '--size', 16, '--distances', 'pixel')
    assert result.returncode == 0, result.stderr
    p = json.loads((tmp_path/'out'/'probe.json').read_text())['protocol']
    assert (p['anchors'], p['without_partner'], p['skipped']) == (10, 1, 4)


# --- streaming ---

def test_memory_does_not_grow_with_the_number_of_images():
    from spherical_lfm.tools.bench import _peak_of_analysis
    peak = {n: _peak_of_analysis('digits', 'digits', 16, 32, n) for n in (1000, 10_000)}
    assert 200 < peak[10_000] < 1.03*peak[1000], peak


def test_two_processes_see_what_one_sees(tmp_path):
    launch = ['torchrun', '--standalone', '--nproc_per_node', 2, '--no-python', BIN/'slfm_analyze'] # accelerate starts one process where there is no GPU
    common = ['digits', 'digits', '--size', 16, '--statistics', 'measure', '--out']
    one, two = call('slfm_analyze', *common, tmp_path/'one'), start(*launch, *common, tmp_path/'two')
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (json.loads((tmp_path/n/'analysis.json').read_text())['digits']['row'] for n in ('one', 'two'))
    for k in ('tokens', 'images', 'raw_mean_over_sqrt_d', 'raw_cv', 'mean_over_sqrt_d', 'cv'): assert a[k] == pytest.approx(b[k], rel=1e-6), k
    assert a['share_t0'] == pytest.approx(b['share_t0'], abs=.01)


def test_streamed_statistics_are_those_of_all_latents_at_once():
    t, (images, _) = load_tokenizer('digits'), images_module.digits_images('train')
    tokenizer, raw, processed = analyze_tokens(t, ImageSource('digits', 16), Analysis(10_000, 'measure', batch_size=100), progress=False)
    with torch.no_grad(): z = t.raw_latents(images).double()
    flow = (z - z.mean((0, 2, 3), keepdim=True))/z.std((0, 2, 3), unbiased=False, keepdim=True)
    for stats, want in ((raw, z), (processed, flow)):
        lengths = want.norm(dim=1)
        s = stats.summary()
        assert s['mean'] == pytest.approx(lengths.mean().item(), rel=1e-5) and s['cv'] == pytest.approx((lengths.std(unbiased=False)/lengths.mean()).item(), rel=1e-4)


# --- real weights ---

@real
@torch.no_grad()
def test_taef2_reconstructs_photographs():
    t, source = load_tokenizer(SHARED/'weights'/'taef2_encoder.safetensors'), ImageSource(SHARED/'data'/'imagenet_samples_256.parquet', 256)
    assert (t.name, t.d, t.downsample) == ('taef2', 32, 8) and t.transform.config == tk.LatentTransform().config
    quality = torch.cat([psnr(t.decode(t.encode(x)), x) for x, _ in source.batches(8, source.shuffled(0), 16)])
    assert quality.mean() > 26


@real
def test_semantic_extractor_knows_photographs():
    from spherical_lfm.engine.features import _resized, efficientnet_lite0
    source, net = ImageSource(SHARED/'data'/'imagenet_samples_256.parquet', 256), efficientnet_lite0()
    x, y = next(source.batches(80, source.shuffled(0)))
    assert (net(_resized(x, (.5,)*3, (.5,)*3)).argmax(1) == y).float().mean() > .75


def test_dinov2_from_a_local_file(tmp_path):
    import timm

    from spherical_lfm.engine.features import feature_distance, semantic_features
    net = random_state(timm.create_model('vit_small_patch14_dinov2', pretrained=False, num_classes=0, img_size=224))
    save_file(net.state_dict(), tmp_path/'dinov2.safetensors')
    features = semantic_features('dinov2', tmp_path/'dinov2.safetensors')
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))*2 - 1
    assert features(x).shape == (2, 384)
    assert feature_distance(features)(x, x.flip(-1)).min() > 1e-3 > feature_distance(features)(x, x).abs().max()


@real
def test_the_study_behind_the_chapters_in_small(tmp_path, monkeypatch):
    "Every command of the study on the real material, with a few images and steps."
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent/'scripts'))
    import study_taef2
    material = tmp_path/'material'
    material.mkdir()
    (material/'taef2').mkdir()
    for f in (SHARED/'weights').glob('taef2_*'): (material/'taef2'/f.name).symlink_to(f)
    for f in (SHARED/'data').iterdir(): (material/f.name).symlink_to(f)
    (material/'weights').symlink_to(SHARED/'weights')
    few = pq.read_table(material/'cifar10_train.parquet').slice(0, 64) # statistics are measured on 2,048 where there are so many
    (material/'cifar10_train.parquet').unlink()
    pq.write_table(few, material/'cifar10_train.parquet')
    large = 'ImageNet 256 px'
    monkeypatch.setitem(study_taef2.PHOTOGRAPHS, large, (study_taef2.PHOTOGRAPHS[large][0], 64)) # a sixteenth of the work
    def run(command, *args):
        result = call(command, *args, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
    monkeypatch.setattr(study_taef2, 'run', run)
    for stage in ('geometry', 'projection', 'family', 'decoder'): study_taef2.STAGES[stage](material, tmp_path/'runs', tmp_path/'out', lambda n: max(4, round(.001*n)))
    geometry = json.loads((tmp_path/'out'/'geometry.json').read_text())
    assert {'digits', 'taef2, CIFAR-10 64 px', 'taef2, ImageNet 256 px'} == geometry.keys()
    family = json.loads((tmp_path/'out'/'family.json').read_text())['rows']
    assert [(r['tokenizer'], r['d']) for r in family] == 2*[('taesd', 4), ('taesdxl', 4), ('taesd3', 16), ('taef1', 16), ('taef2', 32)]
    for r in family:
        assert r['psnr']['original'] > r['psnr']['projected'] > 8 and r['swaps']['full'][0] > r['swaps']['radius'][0] > 0
        for z in (r['raw'], r['standardised']):
            assert z['excursion_sigma'] == pytest.approx(z['expected_excursion_sigma'], rel=.25) and z['share'] == pytest.approx(z['expected_share'], abs=.12) # of four images
    study = json.loads((tmp_path/'out'/'decoder_cifar10.json').read_text())
    assert study['pipelines']['original']['psnr'] > study['pipelines']['original, projected']['psnr'] > 20


def test_every_round_of_the_benchmark_does_its_work(monkeypatch):
    "Latents that lie there finished are not encoded again, so a round that meets those of the last would time nothing."
    import spherical_lfm.tools.bench as bench
    from spherical_lfm.tools.bench import bench_tokenizer
    kind, seen = type(bench.load_tokenizer('digits').autoencoder), []
    encode = kind.encode
    monkeypatch.setattr(kind, 'encode', lambda self, x, *a, **k: (seen.append(len(x)), encode(self, x, *a, **k))[1])
    monkeypatch.setattr(bench, '_peak_of_analysis', lambda *a: 1)
    bench_tokenizer(size=16, count=8, batch_size=4, rounds=2)
    assert seen.count(4) == 2*4*(2 + 1) # batches of analysis, its floor, encoding, its floor; two rounds after a warm-up
