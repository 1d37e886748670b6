"""Several processes give the loss and gradients of one, on the joined batch."""

import os

import pytest
import torch
import torch.distributed as dist
from helpers.models import tiny_mulan
from helpers.processes import start_processes
from torch import nn

import musiclm_pytorch.collectives as collectives
from musiclm_pytorch import MultiLayerContrastiveLoss, SigmoidContrastiveLearning, SoftmaxContrastiveLearning

KINDS = {
    'softmax': dict(decoupled_contrastive_learning=False),
    'decoupled': dict(),
    'sigmoid': dict(sigmoid_contrastive_loss=True),
    'hierarchical': dict(hierarchical_contrastive_loss=True),
    'hierarchical sigmoid': dict(hierarchical_contrastive_loss=True, sigmoid_contrastive_loss=True),
    'words': dict(word_prediction_weight=0.5),
}


def model(kind):
    torch.manual_seed(1)
    mulan = tiny_mulan(dict(depth=3), dict(depth=3), **KINDS[kind]).eval()
    if mulan.words is not None:
        nn.init.normal_(mulan.words.token_emb.weight)
        mulan.training = True  # words are predicted in training only; the towers draw nothing
    return mulan


def batch(total):
    generator = torch.Generator().manual_seed(2)
    wavs = torch.randn(total, 1500, generator=generator)
    return wavs, torch.randint(1, 100, (total, 6), generator=generator)


WORLD = 3
SIZES = {'equal': (3, 3, 3), 'unequal': (2, 4, 3), 'single': (1, 1, 1)}


def worker(rank, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', HF_HUB_OFFLINE='1')
    torch.set_num_threads(1)
    # built before the process group: the world is looked up when the loss is called
    models = {(name, kind): model(kind) for name in SIZES for kind in KINDS}
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=WORLD)
    torch.save({name: of_sizes(rank, name, models) for name in SIZES}, f'{folder}/{rank}.pt')
    torch.save(largest_kept(24), f'{folder}/{rank} kept.pt')
    dist.destroy_process_group()


def of_sizes(rank, name, models):
    sizes = SIZES[name]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    wavs, texts = batch(sum(sizes))
    results = {}
    for kind in KINDS:
        ddp = nn.parallel.DistributedDataParallel(models[name, kind])
        loss = ddp(wavs[own], texts[own])
        loss.backward()
        results[kind] = (loss.detach(), {name: p.grad for name, p in ddp.module.named_parameters()})

    rows = torch.arange(sizes[rank] * 2.0).view(-1, 2).requires_grad_()
    gathered = collectives.gather_rows(rows, collectives.gather_sizes(sizes[rank], rows.device))
    (gathered * (rank + 1)).sum().backward()
    results['gather'] = (gathered.detach(), rows.grad)

    for summed in (False, True):
        columns = rows.detach().T.clone().requires_grad_()
        joined, lengths = collectives.AllGather(1, all_reduce_grads=summed)(columns)
        assert torch.equal(joined.T, gathered)
        assert lengths.tolist() == list(sizes)
        (joined * (rank + 1)).sum().backward()
        assert (columns.grad == (sum(range(1, len(sizes) + 1)) if summed else rank + 1)).all()
    return results


def largest_kept(size):
    """Numbers in the largest tensor that each loss keeps for its backward pass."""
    largest = {}
    for name, loss in {
        'softmax': SoftmaxContrastiveLearning(),
        'sigmoid': SigmoidContrastiveLearning(),
        'layers': MultiLayerContrastiveLoss(audio_dim=4, text_dim=4, dim_latent=4, layers=1).contrast,
    }.items():
        latents = nn.functional.normalize(torch.randn(2, size, 4), dim=-1).requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss(latents[0], latents[1]).backward()
        largest[name] = max(sizes)
    return largest


@pytest.mark.slow
def test_processes_equal_one(tmp_path):
    start_processes(worker, str(tmp_path), count=WORLD)
    results = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(WORLD)]
    for name, sizes in SIZES.items():
        assert_equal_one(sizes, [result[name] for result in results])
    # a rank holds the logits of its own rows only, not (3 * 24) ** 2
    for rank in range(WORLD):
        kept = torch.load(tmp_path / f'{rank} kept.pt', weights_only=True)
        assert set(kept.values()) == {24 * WORLD * 24}


def assert_equal_one(sizes, results):
    for kind in KINDS:
        mulan = model(kind)
        loss = mulan(*batch(sum(sizes)))
        loss.backward()
        for found_loss, gradients in (result[kind] for result in results):
            torch.testing.assert_close(found_loss, loss.detach(), atol=1e-5, rtol=1e-5)
            for name, parameter in mulan.named_parameters():
                # those of small embeddings are large
                atol = 1e-5 * max(1.0, parameter.grad.abs().max().item())
                torch.testing.assert_close(gradients[name], parameter.grad, atol=atol, rtol=1e-4, msg=f'{kind} {name}')

    everything = torch.cat([torch.arange(size * 2.0).view(-1, 2) for size in sizes])
    weights = sum(range(1, len(sizes) + 1))
    for gathered, gradient in (result['gather'] for result in results):
        torch.testing.assert_close(gathered, everything)
        assert (gradient == weights).all()


def test_one_process_needs_no_process_group():
    assert collectives.world_size() == 1
    assert collectives.rank() == 0
    rows = torch.randn(3, 2)
    assert collectives.gather_sizes(3, rows.device) == [3]
    assert collectives.gather_rows(rows, [3]) is rows
    assert collectives.mean_over_ranks(rows) is rows
