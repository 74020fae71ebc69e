"""``launch.lib.hlo``: what a program sends is read from its text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from launch.lib.hlo import Collective, array_bytes, collectives

TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum.1 = f32[] add(%x, %y)
}

ENTRY %main (p: f32[4,3]) -> f32[4,3] {
  %p = f32[4,3]{1,0} parameter(0)
  %half = f16[8]{0} convert(%p), metadata={op_name="jit(step)/all-reduce(x)"}
  %wide = bf16[2,8]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%inner
  %all-reduce.7 = (f32[4,3]{1,0}, f16[8]{0}) all-reduce(%p, /*index=1*/%half), to_apply=%add
  %part = f32[4,3]{1,0} get-tuple-element(%all-reduce.7), index=0
  %all-gather-start = (f16[8]{0}, f16[32]{0}) all-gather-start(%half), dimensions={0}
  %all-gather-done = f16[32]{0} all-gather-done(%all-gather-start)
  %move = bf16[2,8]{1,0} collective-permute(%wide), source_target_pairs={{0,1},{1,0}}
  %move.1 = bf16[2,8]{1,0} collective-permute(%move), source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[4,3]{1,0} copy(%part)
}
"""


def test_operands_are_counted_by_kind():
    assert collectives(TEXT) == {
        "all-reduce": Collective(1, 4 * 12 + 2 * 8),
        "all-gather": Collective(1, 2 * 8),
        "collective-permute": Collective(2, 2 * 2 * 16),
    }


def test_a_compiled_sum_over_devices():
    """One device suffices: XLA keeps a `psum` over an axis of one in the program, or drops it."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"),
        mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
    )  # fmt: skip
    lowered = jax.jit(total).lower(jnp.zeros((6, 5)))
    found = collectives(lowered.compiler_ir("hlo").as_hlo_text())
    assert found == {"all-reduce": Collective(1, 6 * 5 * 4)}


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[]", 4), ("pred[3]{0}", 3), ("(s32[2,2]{1,0}, u8[5]{0})", 21), ("f8e4m3fn[7]{0}", 7)],
)
def test_bytes_of_an_array(shape, size):
    assert array_bytes(shape) == size
