"""The executor: runs any compiled program. There is one."""

from __future__ import annotations

from ringattn.attention.compiled_program import CompiledProgram
from ringattn.attention.instructions import Run
from ringattn.attention.movement import Movement
from ringattn.comm.buffer_pool import BufferPool, pool_of
from ringattn.comm.topology import RankMesh


def execute(program: CompiledProgram, mesh: RankMesh, movement: Movement) -> None:
    """Runs a program: the states, or the gradients, of the movement are updated in place.

    Args:
        program: of this rank.
        mesh: the ranks; all of them run theirs together.
        movement: the tensors, and the kernel call.
    Communication: the messages of the program.
    """
    pool = pool_of(mesh.axes[0].group) if mesh.axes else BufferPool()  # without an axis there are no messages
    run = Run(mesh, movement, pool, program.num_slots, program.num_messages)
    for instruction in program.instructions:
        instruction(run)
