"The pipeline and the scheduler as users of diffusers expect them: saving, precision, offloading, output, callbacks, loops."
import json
import re
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.callbacks import PipelineCallback

from spherical_lfm import sphere
from spherical_lfm.engine.weights import AutoencoderTAEF2
from spherical_lfm.paths import ARMS
from spherical_lfm.sampling import Sampler, initial_noise, sample, velocity_field
from spherical_lfm.sit import SiT
from spherical_lfm.tokenizers import LatentTransform, Tokenizer, load_tokenizer
from spherical_lfm.tools import pipeline as module
from spherical_lfm.tools.pipeline import FlowScheduler, SphericalSiTPipeline

SHAPE = (16, 4, 4)


def network() -> SiT:
    "A small SiT whose velocities are not zero."
    torch.manual_seed(0)
    model = SiT.from_name('SiT-Ti/2', input_size=4, in_channels=16, num_classes=10).eval().requires_grad_(False)
    for p in model.parameters(): p += .05*torch.randn_like(p)
    return model


def make(arm: str = 'spherical-slerp', **settings) -> SphericalSiTPipeline:
    "A pipeline of its own, so that a test may change it."
    tokenizer = load_tokenizer('digits', spherical=ARMS[arm].spherical)
    pipe = SphericalSiTPipeline(network(), FlowScheduler(arm, **settings), tokenizer.autoencoder, tokenizer.transform.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: SphericalSiTPipeline, labels=(3, 7), **options):
    "Images of one seed."
    options = dict(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type='pt') | options
    return pipe(list(labels), **options).images


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A saved pipeline."
    place = tmp_path_factory.mktemp('pipe')/'saved'
    make(shift=2.).save_pretrained(place)
    return place


# ---- saving and opening

@pytest.mark.parametrize('opener', [SphericalSiTPipeline, DiffusionPipeline])
def test_a_saved_pipeline_draws_the_same_images(folder, opener):
    found = opener.from_pretrained(folder)
    assert type(found).__name__ == 'SphericalSiTPipeline' and isinstance(found.transformer, SiT)
    assert found.scheduler.config.shift == 2 and not found.transformer.training
    assert torch.equal(draw(found), draw(make(shift=2.)))


def test_the_folder_says_how_it_is_opened(folder):
    code, = re.findall(r'```python\n(.*)\n```', (folder/'README.md').read_text(), re.DOTALL)
    scope = {}
    exec(code.replace('FOLDER', str(folder)), scope)
    assert torch.equal(draw(scope['pipe']), draw(make(shift=2.)))


def test_a_readme_of_the_user_is_left_alone(tmp_path):
    (tmp_path/'README.md').write_text('mine')
    make().save_pretrained(tmp_path)
    assert (tmp_path/'README.md').read_text() == 'mine'
    assert json.loads((tmp_path/'model_index.json').read_text())['_class_name'] == 'SphericalSiTPipeline'


def test_what_does_not_belong_together_is_refused_at_once():
    vae = load_tokenizer('digits').autoencoder
    with pytest.raises(ValueError, match='the statistics have 3 channels, the latents of custom have 16'):
        SphericalSiTPipeline(network(), FlowScheduler(), vae, dict(mean=[0.]*3, std=[1.]*3))


# ---- precision

@pytest.mark.parametrize('how', ['opened', 'cast'])
def test_bfloat16_weights_draw_nearly_the_same_images(folder, how):
    exact = make(shift=2.)
    pipe = SphericalSiTPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16) if how == 'opened' else make(shift=2.).to(torch.bfloat16)
    assert {p.dtype for m in (pipe.transformer, pipe.vae) for p in m.parameters()} == {torch.bfloat16}
    seen = []
    def note(pipe, k, t, tensors): seen.append(tensors['latents'])
    images = draw(pipe, guidance_scale=2., callback_on_step_end=note)
    difference = (images - draw(exact, guidance_scale=2.)).abs()
    assert images.dtype == torch.float32 and 0 < difference.mean() < .01 and difference.max() < .2
    for z in seen: # a point in bfloat16 would miss the sphere by some 1e-3
        assert z.dtype == torch.float32 and (z.norm(dim=1) - 4).abs().max() < 1e-5


def test_the_network_casts_latents_to_its_dtype():
    model, z, y = network(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2])
    want = model(z, torch.tensor([.2, .7]), y)
    found = model.to(torch.bfloat16)(z, torch.tensor([.2, .7]), y)
    assert found.dtype == torch.bfloat16 and (found - want).norm() < .05*want.norm()


# ---- offloading

def test_everything_meets_on_the_device_of_execution(monkeypatch):
    "The device of shapes stands in for a GPU: weights rest on the CPU, and no tensor of the CPU can be mixed in there."
    pipe = make()
    monkeypatch.setattr('diffusers.pipelines.pipeline_utils.empty_device_cache', lambda _: None) # it has no memory
    monkeypatch.setattr(module, 'check_tokens', lambda *_: None)                                  # and no values
    monkeypatch.setattr(ModelMixin, 'to', lambda model, device, *_: model.to_empty(device=device)) # so none come back
    pipe.enable_model_cpu_offload(device='meta')
    assert pipe.device.type == 'cpu' and pipe._execution_device.type == 'meta'
    images = pipe([3, 7], guidance_scale=2., num_inference_steps=2, output_type='pt').images
    assert images.device.type == 'meta' and images.shape == (2, 3, 16, 16)
    assert pipe.transformer.device.type == pipe.vae.device.type == 'cpu', 'all rest again'


def test_models_offloaded_whole_draw_the_same_images_and_are_freed():
    pipe = make()
    want = draw(pipe, guidance_scale=2.)
    pipe.enable_model_cpu_offload(device='cpu')
    for _ in range(2):
        hooks = list(pipe._all_hooks)
        assert torch.equal(draw(pipe, guidance_scale=2.), want)
        assert len(hooks) == 2 and not {*map(id, hooks)} & {*map(id, pipe._all_hooks)}, 'freed, then set anew'


def test_models_offloaded_layer_by_layer_draw_the_same_images():
    "As `enable_sequential_cpu_offload` does it: outside of a layer's own work its weights have no values."
    pipe = make()
    want = draw(pipe, guidance_scale=2.)
    for part in (pipe.transformer, pipe.vae): cpu_offload(part, torch.device('cpu'), offload_buffers=True)
    assert {p.device.type for m in (pipe.transformer, pipe.vae) for p in m.parameters()} == {'meta'}
    assert torch.equal(draw(pipe, guidance_scale=2.), want)


def test_hooks_move_our_own_autoencoder_before_it_decodes_and_encodes():
    vae, moved = AutoencoderTAEF2(), []
    vae._hf_hook = SimpleNamespace(pre_forward=lambda m: moved.append(m))
    vae.decode(vae.encode(torch.zeros(1, 3, 16, 16)).latents)
    assert moved == [vae, vae]


# ---- parts replaced

def test_another_autoencoder_is_the_one_that_decodes():
    pipe, other = make(), load_tokenizer('digits').autoencoder
    before = draw(pipe)
    other.decoder.conv_out.bias.data += .5
    other.decoder.conv_out.weight.data *= 0
    pipe.vae = other
    after = draw(pipe)
    want = (other.decoder.conv_out.bias/2 + .5).clamp(0, 1).view(1, 3, 1, 1)
    torch.testing.assert_close(after, want.expand_as(after))
    assert not torch.allclose(before, after, atol=.05)


def test_another_scheduler_is_the_one_that_samples_and_decodes():
    pipe = make()
    pipe.scheduler = FlowScheduler('vanilla-linear', shift=3.)
    z, want = (draw(p, output_type='latent') for p in (pipe, make('vanilla-linear', shift=3.)))
    assert torch.equal(z, want) and (z.norm(dim=1) - 4).abs().max() > .5, 'nothing is projected'
    decode = Tokenizer(pipe.vae, LatentTransform(**pipe.config.transform)).decode
    torch.testing.assert_close(draw(pipe), (decode(z)/2 + .5).clamp(0, 1), atol=1e-5, rtol=0)


# ---- what comes out and what goes in

def test_output_types_are_those_of_diffusers():
    pipe = make()
    z, pt, array, pil = (draw(pipe, output_type=kind) for kind in ('latent', 'pt', 'np', 'pil'))
    images = load_tokenizer('digits', spherical=True).decode(z)
    assert z.shape == (2, *SHAPE) and pt.shape == (2, 3, 16, 16) and array.shape == (2, 16, 16, 3) and images.min() < -.5
    torch.testing.assert_close(pt, (images/2 + .5).clamp(0, 1), atol=1e-5, rtol=0)
    assert 0 <= pt.min() and pt.max() <= 1 and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.array(i) for i in pil]), (array*255).round().astype('uint8'))
    assert torch.equal(pipe([3], num_inference_steps=1, output_type='pt', return_dict=False, generator=torch.Generator().manual_seed(0))[0],
                       draw(pipe, [3], num_inference_steps=1))


def test_an_autoencoder_of_images_in_0_1_is_not_stretched():
    pytest.importorskip('transformers')
    vae = diffusers.AutoencoderRAE(
        encoder_type='dinov2', encoder_hidden_size=128, encoder_patch_size=14, encoder_num_hidden_layers=1, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32, patch_size=16, encoder_input_size=56)
    model = SiT(input_size=4, in_channels=128, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    pipe = SphericalSiTPipeline(model, FlowScheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad(): own = vae.decode(draw(pipe, output_type='latent')).sample
    torch.testing.assert_close(draw(pipe), own.clamp(0, 1), atol=1e-5, rtol=0)


def test_labels_in_every_form_and_several_images_of_each():
    pipe = make()
    one = draw(pipe, [3])
    for labels in (3, [3], torch.tensor(3), torch.tensor([3])):
        found = pipe(labels, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type='pt').images
        assert torch.equal(found, one)
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    found = draw(pipe, [3, 7], num_images_per_label=2, generator=generators)
    for k, label in enumerate((3, 3, 7, 7)): # in this order, each from its own generator
        torch.testing.assert_close(found[k:k + 1], draw(pipe, [label], generator=torch.Generator().manual_seed(k)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='2 generators for 4 images: give one for all, or one per image'):
        draw(pipe, num_images_per_label=2, generator=generators[:2])
    with pytest.raises(ValueError, match='num_images_per_label must be at least 1'): draw(pipe, num_images_per_label=0)


@pytest.mark.parametrize('arm', list(ARMS))
def test_given_latents_are_the_noise(arm):
    pipe, noise = make(arm), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    found, want = draw(pipe, latents=noise.double(), output_type='latent'), draw(pipe, output_type='latent')
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r'latents must be \[3, 16, 4, 4\], got \[2, 16, 4, 4\]: give one per image'):
        draw(pipe, [1, 2, 3], latents=noise)
    with pytest.raises(ValueError, match='NaN'): draw(pipe, latents=noise/0*0)


def test_guidance_reaches_to_the_end_of_its_interval():
    "As in `sample`: 0.6 is a time of five steps, and no number of float32."
    pipe, noise = make(), initial_noise(ARMS['spherical-slerp'], SHAPE, range(2))
    options = dict(guidance=4., interval=(.2, .6))
    want = sample(pipe.transformer, pipe.scheduler.path, torch.tensor([3, 7]), Sampler(5, **options), noise)
    found = draw(pipe, num_inference_steps=5, guidance_scale=4., guidance_interval=(.2, .6), latents=noise, output_type='latent')
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


# ---- callbacks

def test_a_callback_sees_every_step_and_replaces_latents():
    pipe, seen = make('vanilla-linear'), []
    def restart(pipe, k, t, tensors):
        seen.append((k, float(t), tensors['latents']))
        return {'latents': torch.zeros_like(tensors['latents'], dtype=torch.float64)} if k == 2 else None
    z = draw(pipe, callback_on_step_end=restart, output_type='latent')
    assert [(k, t) for k, t, _ in seen] == [(0, 0.), (1, .25), (2, .5), (3, .75)] and torch.equal(seen[-1][2], z)
    y = torch.tensor([3, 7])
    want = velocity_field(pipe.transformer, pipe.scheduler.path, y)(torch.zeros(2, *SHAPE), .75)/4
    assert z.dtype == torch.float32 and z.abs().max() > 0
    torch.testing.assert_close(z, want, atol=1e-6, rtol=1e-5)


def test_a_callback_may_interrupt_and_ask_for_no_tensors():
    pipe, seen = make(), []
    def stop(pipe, k, t, tensors):
        seen.append((k, pipe.num_timesteps, tensors))
        pipe._interrupt = k == 1
    draw(pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=[])
    assert seen == [(0, 4, {}), (1, 4, {})]
    assert len(draw(pipe, callback_on_step_end=None)) == 2, 'the next call runs again'
    with pytest.raises(ValueError, match=r"has \['prompt_embeds'\]: choose from \['latents'\]"):
        draw(pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=['prompt_embeds'])


def test_a_callback_object_of_diffusers_names_its_own_tensors():
    class Halve(PipelineCallback):
        tensor_inputs = ['latents']
        def callback_fn(self, pipe, k, t, tensors):
            return {'latents': tensors['latents']/2} if k == pipe.num_timesteps*self.config.cutoff_step_ratio - 1 else tensors
    found = draw(make('vanilla-linear'), callback_on_step_end=Halve(cutoff_step_ratio=1.), callback_on_step_end_tensor_inputs=[], output_type='latent')
    assert torch.equal(found, draw(make('vanilla-linear'), output_type='latent')/2)


# ---- the scheduler in loops of others

def loop(scheduler, model, z: torch.Tensor, y: torch.Tensor, steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    "What any library does with a scheduler of diffusers, by heart."
    scheduler.set_timesteps(steps, device='cpu')
    z = z*scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        v = model(scheduler.scale_model_input(z, t).to(dtype), t.expand(len(z)), y)
        z = scheduler.step(v, t, z, return_dict=False)[0]
    return z


@pytest.mark.parametrize('arm', list(ARMS))
@pytest.mark.parametrize('shift', [1., 3., 1e-8, 1e8])
def test_a_bare_loop_is_sample(arm, shift):
    "With the small shift all times but the first are 1 in float32; with the large one they nearly are 0."
    model, y, z = network(), torch.tensor([3, 7]), initial_noise(ARMS[arm], SHAPE, range(2))
    want = sample(model, ARMS[arm], y, Sampler(5, shift=shift), z)
    scheduler = FlowScheduler(arm, shift=shift)
    torch.testing.assert_close(loop(scheduler, model, z, y, 5), want, atol=1e-5, rtol=1e-5)
    assert scheduler.order == 1 and len(scheduler.timesteps) == 5 == scheduler.step_index
    assert (want - z).abs().mean() > .01


def test_a_loop_in_bfloat16_stays_on_the_sphere():
    z = initial_noise(ARMS['spherical-slerp'], SHAPE, range(2))
    model, y = network(), torch.tensor([3, 7])
    want = loop(FlowScheduler(), model, z, y, 4)
    for given in (z, sphere.project(z.bfloat16())):
        found = loop(FlowScheduler(), model.to(torch.bfloat16), given, y, 4, torch.bfloat16)
        assert found.dtype == torch.float32 and (found - want).abs().mean() < .02
    scheduler = FlowScheduler()
    t = torch.tensor([.3, .6])
    assert scheduler.add_noise(z.bfloat16(), z.flip(0).bfloat16(), t).dtype == torch.float32
    torch.testing.assert_close(scheduler.add_noise(z, z.flip(0), t.double()), scheduler.path.interpolate(z.flip(0), z, t)[0])


def test_steps_are_counted_as_by_diffusers_scheduler_of_flow_matching():
    "The same plans of steps, driven alike; times run the other way there."
    ours, theirs, z = FlowScheduler('vanilla-linear'), FlowMatchEulerDiscreteScheduler(), torch.zeros(1, *SHAPE)
    for begin in (None, 0, 2):
        for s in (ours, theirs):
            s.set_timesteps(4)
            assert s.step_index is None
            if begin is not None: s.set_begin_index(begin)
        for k in range(begin or 0, 4):
            a = ours.step(torch.ones_like(z), ours.timesteps[k], z).prev_sample
            theirs.step(torch.ones_like(z), theirs.timesteps[k], z)
            assert ours.step_index == theirs.step_index == k + 1 and a.mean() == pytest.approx(.25)


def test_a_scheduler_refuses_times_that_are_none_and_steps_after_the_last():
    scheduler, z = FlowScheduler('vanilla-linear'), torch.zeros(1, *SHAPE)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match='no step begins at time 0.25: choose one of'): scheduler.step(z, .25, z)
    assert scheduler.step_index is None
    later = scheduler.step(z + 1, torch.tensor(.5, dtype=torch.float64), z).prev_sample
    assert scheduler.step_index == 2 and later.mean() == .5
    with pytest.raises(ValueError, match='all 2 steps are done: use set_timesteps'): scheduler.step(z, .5, z)


def test_a_saved_scheduler_has_its_settings(tmp_path):
    scheduler = FlowScheduler('vanilla-shell', 'adams3', 2.)
    scheduler.save_pretrained(tmp_path)
    for found in (FlowScheduler.from_pretrained(tmp_path), FlowScheduler.from_config(scheduler.config)):
        assert {k: found.config[k] for k in ('arm', 'method', 'shift', 'project_velocity')} == dict(
            arm='vanilla-shell', method='adams3', shift=2., project_velocity=True)
        found.set_timesteps(3)
        assert repr(found.path) == repr(ARMS['vanilla-shell']) and found.timesteps.tolist() == pytest.approx([0, .2, .5])
