"""What code written for musiclm-pytorch 0.2.8 imports and calls beside the models."""

import pytest
import torch
from helpers.training import Tones, assert_same, build, trainer, weights

from musiclm_pytorch import MuLaNEmbedQuantizer, MusicLM, musiclm_pytorch
from musiclm_pytorch.distributed import AllGather
from musiclm_pytorch.trainer import curtail_to_shortest_collate, get_dataloader, pad_to_longest_fn

NAMES = """
    exists first default round_down_nearest_multiple Sequential once print_once log l2norm matrix_diag posemb_sincos_2d
    LayerNorm GEGLU FeedForward Attention Transformer SoftmaxContrastiveLearning SigmoidContrastiveLearning pair
    AudioSpectrogramTransformer TextTransformer interspersed_indices MultiLayerContrastiveLoss MuLaN MuLaNEmbedQuantizer
    MusicLM
"""


def test_upstreams_module_has_its_names(capsys):
    module = musiclm_pytorch
    assert module.interspersed_indices(2, 6).tolist() == [0, 3]
    assert set(NAMES.split()) == set(module.__all__)
    assert (module.MusicLM, module.MuLaNEmbedQuantizer) == (MusicLM, MuLaNEmbedQuantizer)
    assert [module.default(None, 2), module.default(0, 2), module.first('ab'), module.pair(3)] == [2, 0, 'a', (3, 3)]
    assert module.round_down_nearest_multiple(17, 5) == 15
    assert [module.exists(0), module.exists(None)] == [True, False]
    assert len(module.Sequential(torch.nn.ReLU(), None, torch.nn.Tanh())) == 2
    module.print_once('a')
    module.print_once('b')
    assert capsys.readouterr().out == 'a\n'
    t = torch.rand(2, 3, 4)
    assert torch.equal(module.matrix_diag(t), torch.stack([t[:, i, i] for i in range(3)], dim=-1))
    assert module.log(torch.zeros(1)).item() == pytest.approx(-46.05, abs=0.01)
    embedding = module.posemb_sincos_2d(torch.zeros(1, 3, 5, 8, dtype=torch.float64))
    assert (embedding.shape, embedding.dtype) == ((3, 5, 8), torch.float64)
    place = torch.tensor([4.0, 2.0], dtype=torch.float64)  # of x and y, at the first frequency
    torch.testing.assert_close(embedding[2, 4, ::2], torch.stack([place.sin(), place.cos()], dim=1).flatten())


def test_gathering_without_a_process_group():
    x = torch.rand(2, 3)
    assert AllGather(dim=1, all_reduce_grads=True)(x) == (x, None)


def test_collation():
    items = [(torch.arange(3.0), torch.tensor([1, 2]), 'a'), (torch.arange(5.0), torch.tensor([3, 4, 5]), 'b')]
    waves, ids, texts = curtail_to_shortest_collate(items)
    assert (waves.tolist(), ids.tolist(), texts) == ([[0, 1, 2]] * 2, [[1, 2], [3, 4]], ['a', 'b'])
    waves, ids, texts = pad_to_longest_fn(items)
    assert (waves[0].tolist(), ids.tolist(), texts) == ([0, 1, 2, 0, 0], [[1, 2, 0], [3, 4, 5]], ['a', 'b'])
    (waves,) = next(iter(get_dataloader([it[0] for it in items], batch_size=2)))
    assert waves.shape == (2, 5)


def test_attributes_of_the_trainer(tmp_path, capsys):
    run = trainer(tmp_path)
    assert (run.optim, run.is_main, run.is_local_main, run.is_distributed) == (run.optimizer, True, True, False)
    assert (len(run.ds), len(run.valid_ds), len(run.dl), len(run.valid_dl)) == (18, 6, 5, 2)
    assert run.mulan(**next(iter(run.dl))).isfinite()
    assert trainer(tmp_path, valid_frac=0.0).valid_dl is None
    run.print('hello')
    assert capsys.readouterr().out == 'hello\n'
    assert not list(tmp_path.iterdir())


def test_a_loop_of_your_own(tmp_path):
    """Steps one by one are those of `train`, go on behind a file that was saved, and leave checkpoints."""
    straight = trainer(tmp_path / 'straight', num_train_steps=7)
    straight.train(with_validation=False)
    first = trainer(tmp_path / 'own', num_train_steps=7, save_model_every=3)
    while first.steps < 5:
        assert first.train_step()['loss'] > 0
    assert [path.name for path in sorted(first.checkpoint_folder.iterdir())] == ['step-000000003']
    first.save(str(tmp_path / 'mulan.5.pt'))

    again = trainer(tmp_path / 'again', num_train_steps=7)
    again.load(str(tmp_path / 'mulan.5.pt'))
    assert again.steps.item() == 5
    while again.steps < again.num_train_steps:
        again.train_step()
    assert_same(weights(again.mulan), weights(straight.mulan))
    (tmp_path / 'other.pt').write_text('no checkpoint')
    with pytest.raises(ValueError, match='other.pt is damaged'):
        again.load(tmp_path / 'other.pt')


def saved_by_upstream(path, optimizer, steps=2):
    """Train as a user of 0.2.8 did, and save what its trainer saves; the next step's gradients and result too."""
    mulan = build().train()
    mulan.audio.transformer.eval()  # no dropout: what follows has to give the same gradients again
    optimizer = optimizer(mulan.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for step in range(steps + 1):
        if step == steps:
            state = {f'module.{name}': tensor.clone() for name, tensor in mulan.state_dict().items()}
            torch.save(dict(model=state, optim=optimizer.state_dict()), path)
        torch.manual_seed(step)
        mulan(**trainer_batch()).backward()
        gradients = {name: it.grad.clone() for name, it in mulan.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return gradients, weights(mulan)


def trainer_batch():
    waves, ids = zip(*(Tones()[i] for i in range(4)))
    return dict(wavs=torch.stack(waves), texts=torch.stack(ids))


def test_a_file_of_upstreams_trainer_goes_on(tmp_path):
    gradients, wanted = saved_by_upstream(tmp_path / 'mulan.2.pt', torch.optim.Adam)
    run = trainer(tmp_path / 'run', use_ema=True)
    run.load(tmp_path / 'mulan.2.pt')
    assert_same(weights(run.ema.ema_model), weights(run.mulan))
    for name, parameter in run.mulan.named_parameters():
        parameter.grad = gradients[name]
    run.optimizer.step()
    for name, tensor in weights(run.mulan).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="saved with another optimizer than 'lion'"):
        trainer(tmp_path / 'lion', use_lion=True).load(tmp_path / 'mulan.2.pt')
