"""Where the two readings of a program meet: tracing, values, costs.

Where to read:

- the program: `trace` makes the jaxpr that both readings walk; `calls`, `refs`, `contents`, `sites`
  and `wide_types` say what is in it, `primitives` and `primitive_table` what becomes of each
  equation;
- values: `emulate` is the function, `operation` makes one JAX operation of it, `values` evaluates
  equation by equation on `folded` arrays; its rules are in `vector` (with `functions`),
  `matmul_rules`, `collective_rules`, `ragged_rules`, `ragged_exchange`, `host_calls` and `words`;
  `axes` tells which values vary, `turns` and `real_devices` where they are computed, `outside` and
  `own_rules` keep the caller's meshes and settings apart; `pmap` and `wide` stand on top;
- time: `costs` walks the `graph` of a program with `walker`; the rules are in `cost_bodies`,
  `cost_matmuls`, `cost_collectives`, `cost_kernels`, `cost_attention` (of what `attention` and
  `masks` find), `cost_linalg`, `cost_offload` and `cost_ragged`; `fused` makes chains one kernel,
  `spread` divides it over cores, `weights` says how long an element takes; `layout` and `groups`
  tell which device has what, `where` names lines;
- programs that the compiler divides: `auto_sharded` asks `partitioner` and reads its answer with
  `stablehlo`, `stablehlo_rules`, `stablehlo_collectives`, `stablehlo_constants`, `stablehlo_loops`,
  `partition_mesh`, `replica_groups` and `hlo_channels`; `partitioned_reductions`, `linalg_calls`
  and `callback_calls` are what it cannot divide; `one_map` finds those that need none of this.
"""
