"""A program computes, and does nothing else: no host, no other device, no foreign code."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from aquant_jax.deployment import stablehlo
from aquant_jax.errors import InputError

FILE = Path("saved/program")
HOST = "channel_handle = #stablehlo.channel_handle<handle = 1, type = %d>, is_host_transfer = true"
GROUPS = "replica_groups = dense<0> : tensor<1x1xi64>"
PAIRS = "source_target_pairs = dense<0> : tensor<1x2xi64>"
SUM = """({ ^bb0(%a: tensor<f32>, %b: tensor<f32>):
  %s = stablehlo.add %a, %b : tensor<f32>
  stablehlo.return %s : tensor<f32> })"""
# Operations, with the types V of a vector and T of a token.
WAITS = {
    "infeed": '%r:2 = "stablehlo.infeed"(%t) : (T) -> (V, T)',
    "outfeed": '%r = "stablehlo.outfeed"(%x, %t) : (V, T) -> T',
    "send": f'%r = "stablehlo.send"(%x, %t) {{{HOST % 2}}} : (V, T) -> T',
    "recv": f'%r:2 = "stablehlo.recv"(%t) {{{HOST % 3}}} : (T) -> (V, T)',
    "all_reduce": f'%r = "stablehlo.all_reduce"(%x) {SUM} {{{GROUPS}}} : (V) -> V',
    "all_gather": '%r = "stablehlo.all_gather"(%x) '
    f"{{all_gather_dim = 0 : i64, {GROUPS}}} : (V) -> V",
    "collective_permute": f'%r = "stablehlo.collective_permute"(%x) {{{PAIRS}}} : (V) -> V',
    "collective_broadcast": f'%r = "stablehlo.collective_broadcast"(%x) {{{GROUPS}}} : (V) -> V',
}
# Where an operation may hide; %s is its place.
HIDDEN = {
    "main": "%s",
    "function": """%%y = func.call @other(%%x) : (V) -> V
  return %%x : V }
  func.func private @other(%%x: V) -> V {
  %s""",
    "region": """%%c = stablehlo.constant dense<0> : tensor<i32>
  "stablehlo.case"(%%c) ({
  "stablehlo.case"(%%c) ({
  %s
  "stablehlo.return"() : () -> ()}) : (tensor<i32>) -> ()
  "stablehlo.return"() : () -> ()}) : (tensor<i32>) -> ()""",
}


@functools.cache
def negation():
    return export.export(jax.jit(lambda x: -x))(jax.ShapeDtypeStruct((2,), np.float32))


def program_of(body):
    """A program with this text in its main function; MLIR reads text as it reads bytes."""
    text = f"""module {{ func.func public @main(%x: V) -> V {{
  {body}
  return %x : V }} }}"""
    text = re.sub(r"\bV\b", "tensor<2xf32>", re.sub(r"\bT\b", "!stablehlo.token", text))
    return dataclasses.replace(negation(), mlir_module_serialized=text.encode())


@pytest.mark.parametrize("place", HIDDEN)
@pytest.mark.parametrize("name", WAITS)
def test_an_operation_that_waits_is_refused_wherever_it_is(name, place):
    body = f"%t = stablehlo.create_token : T\n  {WAITS[name]}"
    program = program_of(HIDDEN[place] % body)
    program.mlir_module()  # it is valid
    told = (
        rf"^saved/program: the program has stablehlo\.{name}, which reaches the host or other dev"
    )
    with pytest.raises(InputError, match=told):
        stablehlo.check_program(FILE, program)


@pytest.mark.parametrize("place", HIDDEN)
def test_a_foreign_call_is_refused_wherever_it_is(place):
    call = '"stablehlo.custom_call"(%x) {call_target_name = "some\\22code @Sharding"} : (V) -> V'
    program = program_of(HIDDEN[place] % f"%r = {call}")
    with pytest.raises(InputError, match='the program calls some"code @Sharding, which is not'):
        stablehlo.check_program(FILE, program)


def test_another_dialect_is_refused():
    body = "%p = llvm.mlir.zero : !llvm.ptr\n %v = llvm.load %p : !llvm.ptr -> i32"
    with pytest.raises(InputError, match=r"the program has llvm\.load, llvm\.mlir\.zero, which"):
        stablehlo.check_program(FILE, program_of(body))


def test_a_sum_over_devices_is_refused():
    mesh = Mesh(jax.devices()[:1], ("i",))
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "i"),
        mesh=mesh,
        in_specs=P("i"),
        out_specs=P(),
    )
    program = export.export(jax.jit(total))(jax.ShapeDtypeStruct((2,), np.float32))
    with pytest.raises(InputError, match=r"the program has stablehlo\.all_reduce, which"):
        stablehlo.check_program(FILE, program)


def test_what_computes_passes():
    def computes(x):
        values, places = jax.lax.top_k(x, 2)
        noise = jax.random.uniform(jax.random.key(0), x.shape)
        counted = jax.lax.while_loop(lambda y: y.sum() < 3, lambda y: y + 1, jnp.sort(x) + noise)
        return (
            jax.lax.cond(x.sum() > 0, jax.nn.gelu, jax.scipy.special.erf, counted),
            values,
            places,
        )

    run = export.export(jax.jit(computes), platforms=stablehlo.PLATFORMS)
    shape = export.symbolic_shape("n")[0] + 2
    stablehlo.check_program(FILE, run(jax.ShapeDtypeStruct((shape,), np.float32)))


@pytest.mark.parametrize("content", [b"ML\xefR", b"no module", b"module { func.func @main( }"])
def test_bytes_that_are_no_program_are_one_line(content):
    program = dataclasses.replace(negation(), mlir_module_serialized=content)
    with pytest.raises(InputError, match=r"^saved/program is malformed: \S") as told:
        stablehlo.check_program(FILE, program)
    assert "\n" not in str(told.value)
