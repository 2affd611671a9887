"""What a plan says against what small runs really use: bytes that are written, operations that are done, tensors that are saved."""
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spherical_lfm import experiments
from spherical_lfm.engine.features import all_parts, extract_features
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.engine.weights import TOKENIZERS
from spherical_lfm.experiments import PRESETS, get_preset, save_preset
from spherical_lfm.fidelity import measure_reference
from spherical_lfm.paths import SlerpPath
from spherical_lfm.sampling import Sampler, sample
from spherical_lfm.sit import SiT
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import cli, plan
from spherical_lfm.training import TrainConfig, Trainer

COUNT = 200
CPU = plan.Machine('a CPU', 1, {'float32': 1e9, 'bf16': 1e9}, 0, 16e9, 1e12)


def close(told, used): assert told == pytest.approx(used, rel=.15), (told, used, told/used)


def digits(**train): # the preset with other settings of training
    preset = get_preset('digits')
    return replace(preset, train=preset.train | train)


def flops(work: Callable) -> int:
    with FlopCounterMode(display=False) as counter: work()
    return counter.get_total_flops()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Latents of some digits, also mirrored, and a run of one checkpoint."
    root = tmp_path_factory.mktemp('plan')
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), root/'latents', Encoding(shard_size=64), torch.arange(COUNT), progress=False)
    return root


@pytest.fixture(scope='module')
def trainer(folder):
    config = TrainConfig(arm='spherical-slerp', **digits(steps=2, checkpoint_every=1, flip=True).train)
    made = Trainer(config, LatentDataset(folder/'latents', project=project), folder/'run')
    made.fit(progress=False)
    return made


def size_of(place: Path) -> int: return sum(f.stat().st_size for f in place.rglob('*') if f.is_file())


def test_bytes_of_latents(folder):
    close(plan.plan_comparison(digits(flip=True), COUNT, machine=CPU, classes=10).disk['latents'], size_of(folder/'latents'))
    once = plan.plan_comparison(digits(), COUNT, machine=CPU, classes=10)
    assert once.disk['latents'] == COUNT*16*4*4*4


def test_bytes_of_checkpoints(trainer):
    "All of them, the newest ones and one that is being written, of as many arms as are trained."
    preset = digits(steps=2, checkpoint_every=1)
    close(plan.plan_comparison(preset, COUNT, ('spherical-slerp',), CPU, classes=10).disk['checkpoints'], size_of(trainer.out/'checkpoints'))
    each = size_of(trainer.out/'checkpoints')/2
    for train, expected in ((dict(steps=9, checkpoint_every=4), 2*3), (dict(steps=9, checkpoint_every=1, keep=2), 2*2 + 1), (dict(steps=2, checkpoint_every=1, keep=7), 2*2)):
        close(plan.plan_comparison(digits(**train), COUNT, machine=CPU, classes=10).disk['checkpoints'], expected*each)


def test_operations_of_training(trainer):
    "A real step, and the hours that its machine would take for many."
    for checkpointing in (False, True):
        if checkpointing: trainer.net.enable_gradient_checkpointing()
        done = flops(trainer.train_step)
        preset = digits(steps=1000, checkpointing=checkpointing)
        told = plan.plan_comparison(preset, COUNT, ('spherical-slerp',), CPU, classes=10).hours['training']
        close(told, 1000*done/(.4*1e9)/3600)
    trainer.net.disable_gradient_checkpointing()


@pytest.mark.parametrize('sampler, network, data', [
    (Sampler(10), 10, 10), (Sampler(10, guidance=1.5), 20, 20), (Sampler(10, guidance=1.5, interval=(.25, .75)), 15, 15), (Sampler(6, 'heun', 2.), 24, 22),
    (Sampler(4, 'heun', 2., (0., .3)), 11, 10), (Sampler(3, 'adams2'), 4, 4), (Sampler(2, 'rk4'), 8, 5)])
def test_operations_of_sampling(trainer, sampler, network, data):
    "Also where a network predicts data, and the last step is one of Euler."
    assert (plan.evaluations(sampler), plan.evaluations(sampler, 'data')) == (network, data)
    for path, expected in ((SlerpPath(), network), (SlerpPath().predicting('data'), data)):
        done = flops(lambda: sample(trainer.net, path, torch.arange(8) % 10, sampler))
        close(8*expected*plan.network_costs(digits(), 10).velocity, done)


def test_hours_of_scores():
    "Final scores at every guidance, and a curve whose last point is there already if it has as many samples."
    base = replace(digits(steps=10, checkpoint_every=4), sampler=Sampler(10), guidances=(1., 2.), samples=100, curve_samples=40)
    costs = plan.network_costs(base, 10)
    for preset, curve, drawn, evaluated in ((base, True, 320, 100*30 + 3*40*10), (base, False, 200, 100*30), (replace(base, curve_samples=100), True, 400, 100*30 + 2*100*10)):
        found = plan.plan_comparison(preset, COUNT, ('a', 'b'), CPU, curve, 10).hours
        for row, each in (('sampling', evaluated*costs.velocity), ('decoding', drawn*costs.decode), ('features of samples', drawn*costs.extract)):
            assert found[row] == pytest.approx(2*each/(.3*1e9)/3600), row
    mirrored = replace(base, train=base.train | {'flip': True}, reference_count=50)
    one, eight = (plan.plan_comparison(mirrored, COUNT, ('a', 'b'), replace(CPU, devices=n), classes=10).hours for n in (1, 8))
    assert one['encoding'] == pytest.approx(2*COUNT*costs.encode/(.3*1e9)/3600)
    assert one['features of real images'] == pytest.approx(50*costs.extract/(.3*1e9)/3600)
    for row in one: assert eight[row] == pytest.approx(one[row]/8), row


def test_operations_of_the_tokenizer_and_the_extractor():
    tokenizer, images = load_tokenizer('digits'), digits_images('test')[0][:8]
    costs = plan.network_costs(digits(), 10)
    with torch.no_grad():
        tokenizer.encode(images[:1]) # the first call of a size also asks how much memory an image needs
        close(8*costs.encode, flops(lambda: tokenizer.encode(images)))
        z = tokenizer.encode(images)
        close(8*costs.decode, flops(lambda: tokenizer.decode(z)))
    close(8*costs.extract, flops(lambda: extract_features(images, 'digits', parts=all_parts('digits'))))
    assert costs.shape == tuple(z.shape[1:])
    assert sum(costs.features) == sum(x.shape[1] for x in extract_features(images, 'digits', parts=all_parts('digits')).values())


def saved(net: SiT, batch: int, precision: str) -> int:
    "Bytes of all storages that a forward pass saves, but those of parameters: kept alive and told apart by their addresses."
    held = {}
    def note(t):
        held[t.untyped_storage().data_ptr()] = t
        return t
    c = net.config
    z, t, y = torch.randn(batch, c.in_channels, c.input_size, c.input_size), torch.rand(batch), torch.zeros(batch, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
        out = net(z, t, y)
    own = {p.data_ptr() for p in net.parameters()}
    found = sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in own)
    out.sum().backward()
    return found


@pytest.mark.parametrize('precision, per_number', [('float32', 20*4), ('bf16', 48)])
def test_memory_of_activations(precision, per_number):
    "A real forward pass, the formula of the page, and a network that recomputes its blocks, one of which is whole at a time."
    batch, width, tokens, depth = 32, 96, 64, 2
    def make(**changes): return SiT(**dict(input_size=8, patch_size=1, in_channels=16, hidden_size=width, depth=depth, num_heads=4, num_classes=10) | changes)
    net = make()
    for n in (1, batch): close(plan.activation_bytes(net, n, precision), saved(net, n, precision)) # of one sample weights would be most of it
    close(plan.activation_bytes(make(depth=12), batch, precision), 12*batch*tokens*width*per_number)
    close(plan.activation_bytes(make(depth=5), batch, precision), saved(make(depth=5), batch, precision))
    block = saved(make(depth=2), batch, precision) - saved(make(depth=1), batch, precision)
    net.enable_gradient_checkpointing()
    close(plan.activation_bytes(net, batch, precision, True), saved(net, batch, precision) + block)


def test_memory_of_a_trainer(trainer):
    "Weights, average, moments and gradients of a run, and how FSDP and more processes change them."
    config, net = trainer.config, trainer.net
    told = plan._training_memory(net, config, 1)
    trainer._accumulate_loss(trainer.draws(trainer.step))
    held = {'weights and average': [*net.parameters(), *trainer.ema], 'gradients': [p.grad for p in trainer.parameters],
            'moments of AdamW': [s[k] for s in trainer.optimizer.state.values() for k in ('exp_avg', 'exp_avg_sq')]}
    trainer.optimizer.zero_grad()
    for row, tensors in held.items(): close(told[row], sum(x.nbytes for x in tensors))
    eight, cut = plan._training_memory(net, config, 8), plan._training_memory(net, replace(config, parallel='fsdp'), 8)
    assert eight['gradients'] == 2*told['gradients'] and cut['weights and average'] == told['weights and average']/8
    close(eight['activations'], told['activations']/8)
    close(plan._training_memory(net, replace(config, accumulate=4), 1)['activations'], told['activations']/4)


def test_latents_stay_where_there_is_room(folder):
    "As `place_latents` decides: mapped, unless they take less than a third of the GPU, or somebody wants a copy."
    size = COUNT*16*4*4*4
    def held(devices, memory, **train):
        found = plan.plan_comparison(digits(**train), COUNT, machine=replace(CPU, devices=devices, memory=memory), classes=10)
        return found.host['latents'], found.device['latents']
    assert held(4, 0) == held(4, 3*size) == (0, 0) and held(4, 3*size + 3) == (0, size)
    assert held(4, 9*size, resident='no') == (0, 0) and held(4, 9*size, resident='host') == (4*size, 0)


def test_a_reference_costs_what_it_leaves(tmp_path):
    "The .npz of all digits, and per shard of them as much again in moments."
    measure_reference(ImageSource('digits'), tmp_path, 'digits', progress=False)
    found = plan.plan_comparison(digits(), 1438, machine=CPU, classes=10)
    moments, chosen = 8*64*64, 4*1438*64
    close(found.disk['moments of real images'], 2*moments + 2*chosen)
    close(moments + chosen, sum(f.stat().st_size for f in tmp_path.glob('*.npz')))
    imagenet = plan.plan_comparison(get_preset('flux2-b2'), 1_281_167)
    assert imagenet.host['moments of real images'] == plan.plan_comparison(get_preset('flux2-b2'), 100_000).host['moments of real images']
    known = replace(get_preset('flux2-b2'), reference='VIRTUAL_imagenet256_labeled.npz')
    assert plan.plan_comparison(known, 1_281_167).hours['features of real images'] == 0


def test_every_tokenizer_has_an_architecture(tmp_path):
    assert set(plan._AUTOENCODERS) == set(TOKENIZERS)
    shapes = lambda t: {k: tuple(v.shape) for k, v in t.autoencoder.state_dict().items()}
    real = load_tokenizer('digits')
    real.save_pretrained(tmp_path/'mine')
    for bare in (plan.bare_tokenizer('digits'), plan.bare_tokenizer(str(tmp_path/'mine'))):
        assert shapes(bare) == shapes(real) and bare.latent_shape(16, 16) == real.latent_shape(16, 16) == (16, 4, 4)
    assert plan.bare_tokenizer('flux2').latent_shape(256, 256) == (32, 32, 32)
    assert plan.bare_tokenizer('flux2-packed').latent_shape(256, 256) == (128, 16, 16)
    assert plan.bare_tokenizer('vavae').latent_shape(256, 256) == (32, 16, 16)
    with pytest.raises(FileNotFoundError, match='neither a known tokenizer .* give a name or the path'): plan.bare_tokenizer(str(tmp_path/'none'))
    with pytest.raises(ValueError, match='choose a method of fixed steps'): plan.evaluations(Sampler(method='adaptive'))


def test_a_plan_of_the_paper():
    "Figures that can be had on paper: 1,281,167 images twice, 41 checkpoints of two arms, three forward passes of 400,365 steps."
    found = plan.plan_comparison(get_preset('flux2-xl2', bf16=True), *plan.known_data('flux2-xl2')[:1])
    net = plan.network_costs(get_preset('flux2-xl2')).net
    parameters = sum(p.numel() for p in net.parameters())
    assert found.disk['latents'] == 1_281_167*2*32**3*2
    assert found.disk['checkpoints'] == 2*41*16*parameters and 670e6 < parameters < 680e6
    close(found.hours['training'], 2*3*2*118.64e9*256*400_365/(8*.3*989e12)/3600)  # SiT-XL/2 has 118.64 Gflops, as its authors count
    assert found.device_hours == 8*sum(found.hours.values())
    assert not found.obstacles
    assert {name: plan.known_data(name)[0] for name in PRESETS} == {n: 1438 if n == 'digits' else 50_000 if n.startswith('cifar') else 1_281_167 for n in PRESETS}


def test_what_does_not_fit_is_said():
    small = replace(CPU, name='a toy', disk=1e3, host_memory=1e6)
    assert [x.split(':')[0] for x in plan.plan_comparison(digits(), COUNT, machine=small, classes=10).obstacles] == ['disk', 'host memory']
    tight = plan.plan_comparison(digits(), COUNT, machine=replace(CPU, host_memory=5e7), classes=10) # training takes place in it
    assert sum(tight.host.values()) < 5e7 < sum(tight.device.values()) and [x.split(':')[0] for x in tight.obstacles] == ['host memory']
    toy = plan.plan_comparison(digits(), COUNT, machine=replace(CPU, memory=1e6), classes=10)
    assert [x.split(':')[0] for x in toy.obstacles] == ['GPU memory'] and toy.obstacles[0].endswith('of 1.0 MB')


def test_table_is_aligned():
    machines = [replace(CPU, name='a machine with a long name'), plan.H100]
    plans = [plan.plan_comparison(digits(), 1438, machine=m, classes=10) for m in machines]
    title, header, *lines = plan.plan_table(plans).splitlines()
    assert title == 'SiT-Ti/1, 1,200 steps of 64, 2 arms, 1,438 images of 16 px through digits'
    ends = [header.index(m.name) + len(m.name) for m in machines]
    rows = [line for line in lines if line.startswith(('  ', 'device hours', 'share of'))]
    assert len(rows) == sum(len(x) + 1 for x in (plans[0].disk, plans[0].host, plans[0].device, plans[0].hours)) + 2
    for line in rows:
        for end in ends: assert line[end - 1] != ' ' and line[end:end + 2].strip() == '', line
    latents = next(line for line in lines if line.startswith('  latents'))
    assert latents.split()[1:5] == ['1.5', 'MB', '1.5', 'MB'] and latents.endswith('1 shard, 16 x 4 x 4 float32')


def test_a_plan_of_a_file_needs_the_number_of_images(tmp_path):
    save_preset(PRESETS['digits'], tmp_path/'mine.yaml')
    with pytest.raises(SystemExit, match='give --count as well'): cli.slfm_compare([str(tmp_path/'mine.yaml'), '--plan'])


def test_the_command_plans_and_touches_nothing(monkeypatch, tmp_path, capsys):
    "No image, no weights, no network, no file; options change what is planned."
    def refuse(*args, **kwargs): raise AssertionError('nothing is to be opened')
    for name in ('_images', 'compare', 'load_tokenizer'): monkeypatch.setattr(cli, name, refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.chdir(tmp_path)
    cli.slfm_compare(['flux2-b2', '--plan', '--arms', 'all', '--steps', '20000', '--out', 'runs/there'])
    first = capsys.readouterr().out
    assert 'SiT-B/2, 20,000 steps of 256, 4 arms, 1,281,167 images of 256 px through flux2' in first
    assert 'this machine' in first and '8 x H100' in first and '167.9 GB' in first
    cli.slfm_compare(['flux2-b2', '--plan', '--no_curve', '--count', '1000', '--tokenizer', 'vavae', '--samples', '10'])
    second = capsys.readouterr().out
    assert '1,000 images of 256 px through vavae' in second and '2 scores an arm, 20 samples' in second
    assert not [*tmp_path.iterdir()]
    with pytest.raises(SystemExit, match='give --plan as well'): cli.slfm_compare(['digits', '--count', '9'])
    with pytest.raises(SystemExit, match='neither a known tokenizer'): cli.slfm_compare(['digits', '--plan', '--tokenizer', 'nowhere'])


@pytest.mark.parametrize('name, size, images', [('digits', 16, 2048), ('taef2', 64, 2048), ('flux2', 256, 256), ('vavae', 256, 1024), ('taesd', 1024, 64)])
def test_a_report_looks_at_so_many_tokens(name, size, images):
    "A quarter of a million, held in float64: 64 MiB with 32 channels, whatever the size of the images."
    assert experiments._images_looked_at(plan.bare_tokenizer(name), size) == images


def test_the_plan_for_other_gpus_does_not_depend_on_this_machine(monkeypatch, capsys):
    "Where bf16 is emulated this machine plans float32, and eight H100 bf16 as ever."
    columns = {}
    for native in (True, False):
        monkeypatch.setattr(experiments, '_native_bf16', lambda native=native: native)
        cli.slfm_compare(['flux2-b2', '--plan'])
        line = next(x for x in capsys.readouterr().out.splitlines() if x.strip().startswith('training'))
        columns[native] = line.split()[3] # hours of eight H100
    assert columns[True] == columns[False]
    precisions = [get_preset('flux2-b2', bf16=native).train['precision'] for native in (True, False)]
    assert precisions == ['bf16', 'float32']
