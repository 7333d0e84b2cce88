"""The recipes for Accelerate and transformers' Trainer, bit for bit loops by hand."""

import copy
import warnings

import pytest
import torch
from torch import nn

from mbnorm import DoubleForward, MomentumSchedule, convert

METHODS = {"momentum": {"batch_size": 2}, "matched": {}, "memorized": {"memory_size": 6}}
on_every_method = pytest.mark.parametrize("method", METHODS)
STEPS = 6


def package(name):
    with warnings.catch_warnings():
        # its dependencies', at import
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs {name}: pip install {name}")


def assert_same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


def attach(method, model, optimizer):
    double_forward = DoubleForward(model, optimizer)
    if method == "momentum":
        MomentumSchedule(model, STEPS, batch_size=2).follow(optimizer)
    return double_forward


def mlp(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4))
    convert(model, method, **METHODS[method])
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, generator=generator) for _ in range(2 * STEPS)]


def accelerated(method, model, accelerator, xs):
    optimizer = sgd(model)
    attach(method, model, optimizer)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for x in xs:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return wrapped


def by_hand(method, model, xs):
    optimizer = sgd(model)
    attach(method, model, optimizer)
    for i, x in enumerate(xs):
        (model(x).square().mean() / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()


@on_every_method
def test_accelerate_with_accumulation_is_the_loop_by_hand(method):
    accelerate = package("accelerate")
    model, twin = mlp(method), mlp(method)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerated(method, model, accelerator, batches())
    by_hand(method, twin, batches())
    assert_same(model, twin)


def test_accelerates_own_optimizer_runs_no_hooks_and_is_refused():
    accelerate = package("accelerate")
    model = mlp("momentum")
    optimizer = accelerate.Accelerator(cpu=True).prepare(sgd(model))
    with pytest.raises(TypeError, match="got AcceleratedOptimizer: give the one"):
        DoubleForward(model, optimizer)
    with pytest.raises(TypeError, match="got AcceleratedOptimizer"):
        MomentumSchedule(model, 10, batch_size=2).follow(optimizer)
    DoubleForward(model, optimizer.optimizer)


@on_every_method
def test_the_trainer_with_a_callback_of_two_lines_is_the_loop_by_hand(method, tmp_path):
    transformers = package("transformers")
    package("accelerate")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    convert(model, method, **METHODS[method])
    twin = copy.deepcopy(model)

    class Memory(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            self.double_forward = attach(method, model, optimizer.optimizer)

        def on_train_end(self, args, state, control, **kwargs):
            self.double_forward.remove()

    generator = torch.Generator().manual_seed(1)
    images = [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3}
        for i in range(4 * STEPS)
    ]
    optimizer = sgd(model)
    seen = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            seen.append({name: kwargs[name] for name in ("pixel_values", "labels")})

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=images,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[Memory()],
    )
    trainer.train()
    handle.remove()
    assert len(seen) == 2 * STEPS
    optimizer = sgd(twin)
    attach(method, twin, optimizer)
    for i, batch in enumerate(seen):
        # whose model takes further keywords is to divide the loss by the micro-batches, and this one does not
        twin.train()(**batch).loss.backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, twin)
