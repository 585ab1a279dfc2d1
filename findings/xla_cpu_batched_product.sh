#!/usr/bin/env bash
# On a CPU, XLA computes a batched matrix product on one core, however many there are.
#
# Packages: jax 0.10.2 (jaxlib 0.10.2) and torch 2.13.0, Python 3.11, Linux x86-64, two cores.
# Behaviour: a product of two matrices is shared among the cores. A product with a batch axis, such as attention's scores
# (48 × [128, 64] × [64, 128]), takes as long on two cores as on one. torch.bmm takes half as long on two.
# Seen (Intel Xeon with AVX-512, two cores): jax batched 847 µs on one core and 850 µs on two; jax single product 625 µs and 424 µs;
# torch.bmm 756 µs and 372 µs.
# Exits with 1 if that changes: if two cores are 1.3 times as fast as one in the batched product. Needs two idle cores.
set -euo pipefail
[ "$(nproc)" -ge 2 ] || { echo "needs two cores" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 torch==2.13.0 numpy
cat >"$work/time.py" <<'PYTHON'
import sys, time

cores, side = int(sys.argv[1]), sys.argv[2]
import numpy as np

a = np.random.default_rng(0).standard_normal((48, 128, 64)).astype(np.float32)
b = np.random.default_rng(1).standard_normal((48, 64, 128)).astype(np.float32)
if side == "torch":
    import torch

    torch.set_num_threads(cores)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    run = lambda: torch.bmm(x, y)
else:
    import jax

    product = jax.jit(lambda a, b: a @ b)
    if side == "single":
        a, b = a.reshape(-1, 64), b[0]
    x, y = jax.numpy.asarray(a), jax.numpy.asarray(b)
    run = lambda: product(x, y).block_until_ready()
run()
best = float("inf")
for _ in range(20):
    started = time.perf_counter()
    for _ in range(20):
        run()
    best = min(best, (time.perf_counter() - started) / 20)
print(round(best * 1e6))
PYTHON
time_of() { taskset -c "$1" "$work/env/bin/python" "$work/time.py" "$2" "$3"; }
for side in batched single torch; do
    one=$(time_of 0 1 "$side")
    two=$(time_of 0,1 2 "$side")
    echo "$side: $one µs on one core, $two µs on two"
    declare "$side=$((100 * one / two))"
done
echo "two cores are faster by: batched $batched %, single $single %, torch.bmm $torch % (100 % = as fast as one)"
[ "$batched" -lt 130 ] && [ "$single" -ge 120 ] && [ "$torch" -ge 130 ]
