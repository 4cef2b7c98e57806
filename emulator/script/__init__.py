"""Whole scripts on the virtual machine: `cm384 exec train.py`.

A script runs in a process of its own with as many host devices as the machine has. Every jitted
call that it makes is a *step*: evaluated as the machine computes it, on one host device, and costed
as the machine's. What the script does between steps is its own affair, and listed.

    clock.py      the time that the script reads
    jax_calls.py  where the script's calls of JAX are caught
    compiled.py   ... and those of functions that it has compiled ahead of time
    eager.py      what they are besides steps
    steps.py      one step: values, time
    same.py       whether two traces of a function compute the same
    placement.py  arrays between the script's devices and the one that computes
    references.py `jax.Ref`s that a step reads and writes
    notice.py     what is said while the host works for long
    report.py     what is printed at the end
    process.py    the script's process
"""
