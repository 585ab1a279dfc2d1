"""The HLO reader: on a program compiled for four devices, and on lines as the TPU's compiler writes them."""

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.preflight.collectives import Traffic, collectives, traffic
from jaxpeft.training.sharding import data_parallel

TPU = """HloModule jit_train_steps, is_scheduled=true, num_partitions=256

%region_42 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%body.3 (p: (s32[], f32[768,8])) -> (s32[], f32[768,8]) {
  %p = (s32[], f32[768,8]) parameter(0)
  %all-reduce.26 = (f32[]{:T(128)}, s32[1]{0:T(128)}) all-reduce(%x, %y), channel_id=1, to_apply=%region_42
  %all-reduce-start.2 = (bf16[768,8]{0,1:T(8,128)(2,1)S(1)}, /*index=1*/f32[8,768]{1,0}) all-reduce-start(%u, %v), to_apply=%region_42
  %all-reduce-done.2 = (bf16[768,8]{0,1}, f32[8,768]{1,0}) all-reduce-done(%all-reduce-start.2)
  ROOT %t = (s32[], f32[768,8]) tuple(%i, %z)
}

%cond.4 (p: (s32[], f32[768,8])) -> pred[] {
  %p.1 = (s32[], f32[768,8]) parameter(0)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9 (arg: f32[768,8]) -> f32[768,8] {
  %arg = f32[768,8]{1,0} parameter(0)
  %permute = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[], u32[]) collective-permute-start(%arg), source_target_pairs={{0,1}}
  %while.1 = (s32[], f32[768,8]) while(%tuple), condition=%cond.4, body=%body.3TRIPS
  ROOT %out = f32[768,8]{1,0} get-tuple-element(%while.1), index=1
}
"""
GRADIENT_BYTES = 768 * 8 * 2 + 8 * 768 * 4


def test_the_tpu_s_lines_layouts_tuples_and_starts():
    found = collectives(TPU.replace("TRIPS", ""))
    assert [each.opcode for each in found] == ["all-reduce", "all-reduce", "collective-permute"]
    assert [each.array_bytes for each in found] == [0, GRADIENT_BYTES, 4 * 2 * 4]
    assert [each.scalar_bytes for each in found] == [8, 0, 0]
    assert [each.sent_bytes for each in found] == [2 * 255 / 256 * 8, 2 * 255 / 256 * GRADIENT_BYTES, 32]


def test_a_loop_counts_as_often_as_it_turns():
    known = TPU.replace("TRIPS", ', backend_config={"known_trip_count":{"n":"10"}}')
    sent = 2 * 255 / 256 * 10 * (GRADIENT_BYTES + 8) + 32
    assert traffic(known) == Traffic(
        10 * GRADIENT_BYTES + 32, 80, pytest.approx(sent), {"all-reduce": 20, "collective-permute": 1}
    )
    # How often training's turns is data: one turn is one pass.
    assert traffic(TPU.replace("TRIPS", "")).array_bytes == GRADIENT_BYTES + 32


@pytest.mark.usefixtures("compiled_afresh")
def test_a_program_without_collectives_sends_nothing():
    assert traffic(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()) == Traffic(0, 0, 0, {})


@pytest.mark.parametrize(
    ("operation", "put_in", "sent"),
    [
        # Of 1024 floats on each of 4 chips: what goes in counts, whatever the type of the result says.
        ("f32[1024]{0} all-reduce(%x), replica_groups={{0,1,2,3}}", 4096, 2 * 3 / 4 * 4096),
        ("f32[4096]{0} all-gather(%x), replica_groups=[2,4]<=[8]", 4096, 3 * 4096),
        ("(f32[1024]{0}, f32[4096]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]", 4096, 3 * 4096),
        ("f32[256]{0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}", 4096, 3 / 4 * 4096),
        ("f32[1024]{0} all-to-all(%x), replica_groups={{0,1,2,3}}", 4096, 3 / 4 * 4096),
    ],
)
def test_what_goes_in_and_what_is_sent(operation, put_in, sent):
    (found,) = collectives(
        f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[1024]) -> f32[] {{\n  %y = {operation}\n}}\n"
    )
    assert (found.array_bytes, found.num_chips, found.sent_bytes) == (put_in, 4, sent)


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_compiled_for_four_devices(dtype):
    parallel = data_parallel()
    assert parallel.mesh.size == 4
    weights = parallel.replicated_shapes(jax.ShapeDtypeStruct((16, 3), dtype))
    rows = parallel.split_shapes(jax.ShapeDtypeStruct((8, 16), dtype))
    step = jax.jit(jax.value_and_grad(lambda w, x: (x @ w).sum()), out_shardings=weights.sharding)
    sent = traffic(step.lower(weights, rows).compile().as_text())
    # The gradient, whose elements the CPU's compiler may widen to add them up, and the loss.
    assert sent.array_bytes in (16 * 3 * jnp.dtype(dtype).itemsize, 16 * 3 * 4)
    assert 0 < sent.scalar_bytes <= 4
