import sys, os
sys.path.insert(0,"scripts/bench")
import jax, jax.numpy as jnp
import indexer as b
from pallas_kernels.indexer import mosaic
want=sys.argv[1]; cand=tuple(map(int,sys.argv[2].split())) if len(sys.argv)>2 and sys.argv[2] else ()
case=[c for c in b._cases() if f"{c.id} {c.label}"==want][0]
f=jax.jit(case.run(cand))
for i in range(3): jax.block_until_ready(f(*case.inputs[i%len(case.inputs)]))
