"""A program that fits small problems on many devices or as one of many processes, and prints what it reached as JSON.

`test_devices.py` runs it: the number of devices has to be set before JAX starts. Its options are one JSON object.
"""

import json
import os
import sys

OPTIONS = {"devices": 1, "x64": True, "processes": 1, "process": 0, "port": 0, "heartbeat": 10, "data": ""}
OPTIONS |= {"meshes": [[1, 1]], "cases": ["full"], "run": None, "every_steps": 10, "steps": 30}
OPTIONS |= json.loads(sys.argv[1])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={OPTIONS['devices']}"

import jax  # noqa: E402

jax.config.update("jax_enable_x64", OPTIONS["x64"])
if OPTIONS["processes"] > 1:
    jax.distributed.initialize(
        f"localhost:{OPTIONS['port']}",
        OPTIONS["processes"],
        OPTIONS["process"],
        heartbeat_timeout_seconds=OPTIONS["heartbeat"],
    )

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import rotsparse as rs  # noqa: E402
from rotsparse.data import sources  # noqa: E402
from rotsparse.objectives import ActivationSparsity, JacobianSparsity, WeightedSum  # noqa: E402

DTYPE = np.float64 if OPTIONS["x64"] else np.float32
RNG = np.random.default_rng(0)
LAYER = rs.MLP(
    RNG.standard_normal((14, 7)).astype(DTYPE) / 3,
    RNG.standard_normal(14).astype(DTYPE),
    RNG.standard_normal((6, 14)).astype(DTYPE) / 3,
    activation="gelu",
)
X = RNG.standard_normal((203, 7)).astype(DTYPE)  # no multiple of anything: the last device's part is filled up
NEXT = rs.Dense(RNG.standard_normal((5, 6)).astype(DTYPE) / 3, activation="gelu")


def adam(batch_size=None):
    return rs.Riemannian(optax.adam(0.1), steps=OPTIONS["steps"], batch_size=batch_size)


def fit(case, mesh):
    """The solution of one of the problems, two restarts each."""
    run = rs.Run(OPTIONS["run"], every_steps=OPTIONS["every_steps"], mesh=mesh)
    options = {"key": jax.random.key(1), "restarts": 2, "run": run}
    if case == "full":
        return rs.find_rotations(LAYER, X, method=adam(), **options)
    if case == "minibatch":
        return rs.find_rotations(LAYER, X, method=adam(batch_size=18), validation=X[:101], **options)
    if case == "source":
        sources.RESIDENT_EXAMPLES = 50
        return rs.find_rotations(LAYER, np.load(OPTIONS["data"], mmap_mode="r"), method=adam(batch_size=16), **options)
    if case == "chain":
        sources.RESIDENT_EXAMPLES = 50
        x = np.load(OPTIONS["data"], mmap_mode="r")
        return rs.fit_chain([LAYER, NEXT], x, method=adam(batch_size=16), joint=True, **options)
    assert case == "sum"
    terms = JacobianSparsity(LAYER, X, rs.Log(0.1)), ActivationSparsity(X, rs.Log(0.1))
    return rs.minimize(
        WeightedSum(terms, (1.0, 0.5)),
        {"in": jnp.eye(7, dtype=DTYPE), "out": jnp.eye(6, dtype=DTYPE)},
        method=adam(batch_size=9),
        **options,
    )


def main():
    if OPTIONS["data"] and not os.path.exists(OPTIONS["data"]):
        np.save(OPTIONS["data"], X)
    results = []
    for case in OPTIONS["cases"]:
        for mesh in OPTIONS["meshes"]:
            if mesh is not None:
                count, restarts = mesh
                mesh = rs.device_mesh(restarts=restarts, devices=jax.devices()[:count])
            solution = fit(case, mesh)
            results.append([solution.value, *solution.candidate_values.tolist()])
            ended = {"resumed_at": solution.stats.get("resumed_at"), "result": solution.result.name}
            print(json.dumps(ended | {"steps": solution.stats["steps"]}), file=sys.stderr, flush=True)
    if jax.process_index() == 0:
        print(json.dumps(results), flush=True)


main()
