"""An autoencoder that can be computed in the head: 2 x 2 blocks of pixels are the twelve channels of a token."""
import inspect

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from spherical_lfm.tokenizers import LatentTransform, Tokenizer


class Blocks(ModelMixin, ConfigMixin):
    "Images [B, 3, H, W] to latents [B, 12, H/2, W/2] and back, times a gain on the way out."
    @register_to_config
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(1, 1, bias=False)

    def encode(self, images): return AutoencoderTinyOutput(latents=F.pixel_unshuffle(images, 2))

    def decode(self, latents): return DecoderOutput(sample=self.decoder.weight*F.pixel_shuffle(latents, 2))


def blocks(spherical: bool = False, gain: float = 1., **transform) -> Tokenizer:
    "A tokenizer around it."
    model = Blocks().requires_grad_(False)
    model.decoder.weight.fill_(gain)
    return Tokenizer(model, LatentTransform(**transform), spherical, 'blocks')


def noise(*shape, seed: int = 0, scale: float = 1.):
    "Gaussian numbers that depend on the seed alone."
    return scale*torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    "Stands in for a function of a module: remembers the arguments of every call by name, and answers."
    def __init__(self, monkeypatch, module, name: str, answer):
        signature, self.calls = inspect.signature(getattr(module, name)), []

        def stand_in(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD: given |= given.pop(parameter.name)
            self.calls.append(given)
            return answer(given)
        monkeypatch.setattr(module, name, stand_in)
