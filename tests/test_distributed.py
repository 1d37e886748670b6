"""Several processes give the loss and gradients of one, on the joined batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_mulan
from torch import nn

from musiclm_pytorch import MultiLayerContrastiveLoss, SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_pytorch.distributed import collectives

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


def worker(rank, sizes, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', HF_HUB_OFFLINE='1')
    torch.set_num_threads(1)
    # built before the process group: the world is looked up when the loss is called
    models = {kind: model(kind) for kind in KINDS}
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=len(sizes))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    wavs, texts = batch(sum(sizes))

    results = {}
    for kind, mulan in models.items():
        ddp = nn.parallel.DistributedDataParallel(mulan)
        loss = ddp(wavs[own], texts[own])
        loss.backward()
        results[kind] = (loss.detach(), {name: p.grad for name, p in mulan.named_parameters()})

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
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(3, 3), (2, 4, 3), (1, 1)], ids=str)
def test_processes_equal_one(sizes, tmp_path):
    mp.start_processes(worker, args=(sizes, str(tmp_path)), nprocs=len(sizes), start_method='spawn')
    results = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(len(sizes))]

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


def count_worker(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
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
    torch.save(largest, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_rank_holds_the_logits_of_its_own_rows_only(tmp_path):
    size = 24
    mp.start_processes(count_worker, args=(size, str(tmp_path)), nprocs=2, start_method='spawn')
    for rank in range(2):
        for largest in torch.load(tmp_path / f'{rank}.pt', weights_only=True).values():
            assert largest == size * 2 * size  # not (2 * size) ** 2


def test_one_process_needs_no_process_group():
    assert collectives.world_size() == 1
    assert collectives.rank() == 0
    rows = torch.randn(3, 2)
    assert collectives.gather_sizes(3, rows.device) == [3]
    assert collectives.gather_rows(rows, [3]) is rows
    assert collectives.mean_over_ranks(rows) is rows
