"""What a first user does, where nothing but torch is installed; run by `make package` and by a test."""

import time

import torch
from torch import nn

import mbnorm

started = time.perf_counter()
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
report = mbnorm.convert(model, "matched")
if set(report.converted) != {"0", "1"}:
    raise SystemExit(f"expected layers 0 and 1 to be converted, got: {report}")
optimizer = None
for _ in range(3):
    loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.randint(10, (2,)))
    # lazy layers have no parameters before the first forward
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
x = torch.randn(2, 3, 8, 8)
before = model.eval()(x)
mbnorm.revert(model)
if type(model[1]) is not nn.BatchNorm2d or not torch.equal(model(x), before):
    raise SystemExit("expected torch's own layer with the same output")
print(f"{mbnorm.__file__}: 3 steps in {time.perf_counter() - started:.1f} s")
print(f"backend {mbnorm.functional.backend_for(x)}")
