"""How a run that ``srun`` has started finds its ranks."""

import os
import re
from collections.abc import Mapping

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from typing_extensions import override

from segalign.errors import ConfigError

_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


class SlurmEnvironment(SLURMEnvironment):
    """Lightning's environment of SLURM, which neither answers signals nor requeues by itself.

    Raises:
        ConfigError: If the job's tasks were not started in a way that a run can use.
    """

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @property
    @override
    def main_address(self) -> str:
        """The value of ``MASTER_ADDR``, or else the first node of this step."""
        if "MASTER_ADDR" not in os.environ:
            lists = (os.environ.get(name) for name in _NODE_LISTS)
            nodes = next((found for found in lists if found), "127.0.0.1")
            os.environ["MASTER_ADDR"] = first_node(nodes)
        return os.environ["MASTER_ADDR"]

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse trainer settings that do not fit the job's tasks.

        Raises:
            ConfigError: If they do not.
        """
        check_fit(os.environ, num_devices, num_nodes)

    @staticmethod
    @override
    def _validate_srun_variables() -> None:
        check_tasks(os.environ)


def slurm_environment() -> SlurmEnvironment | None:
    """Return the environment if SLURM has started this process, and not another launcher in it.

    Raises:
        ConfigError: If the job's tasks were not started in a way that a run can use.
    """
    # Lightning's own look warns of an unused `srun`, also where there is no job at all.
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect():
        return None
    return SlurmEnvironment() if SLURMEnvironment.detect() else None


def first_node(nodes: str) -> str:
    """Name the first node of a list as SLURM writes it, such as ``gpu[07-09,12],cpu1``."""
    first = re.split(r"[,\s](?![^\[]*\])", nodes.strip(), maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def check_tasks(variables: Mapping[str, str]) -> None:
    """Refuse several tasks without a number for each node, or without ``srun``.

    Raises:
        ConfigError: If it is so.
    """
    count = int(variables.get("SLURM_NTASKS", "1"))
    if count <= 1:
        return
    if "SLURM_NTASKS_PER_NODE" not in variables:
        raise ConfigError(
            f"expected the tasks of a SLURM job as `--ntasks-per-node`; got {count} tasks by "
            "`--ntasks` alone. Give sbatch, or srun, `--nodes` and `--ntasks-per-node`, one task "
            "for each device."
        )
    if "SLURM_STEP_ID" not in variables:
        raise ConfigError(
            f"expected `srun` to start the {count} tasks of this SLURM job; got one process, which "
            "would wait for the others. Put `srun` in front of `python main.py`."
        )


def check_fit(variables: Mapping[str, str], num_devices: int, num_nodes: int) -> None:
    """Refuse a trainer that does not use exactly the tasks of a SLURM job.

    Args:
        variables: What SLURM has set.
        num_devices: ``trainer.devices``, resolved.
        num_nodes: ``trainer.num_nodes``.

    Raises:
        ConfigError: If it does not.
    """
    count = int(variables.get("SLURM_NTASKS", "1"))
    # A step of one task may run in a job of many.
    per_node = int(variables.get("SLURM_NTASKS_PER_NODE", count)) if count > 1 else 1
    nodes = int(variables.get("SLURM_NNODES", "1")) if count > 1 else 1
    if (num_devices, num_nodes) == (per_node, nodes) and per_node * nodes == count:
        return
    raise ConfigError(
        "expected one SLURM task for each device; got "
        f"`trainer.devices` {num_devices} and `trainer.num_nodes` {num_nodes}, but {count} tasks "
        f"on {nodes} nodes, {per_node} on each. Set `--trainer.devices {per_node} "
        f"--trainer.num_nodes {nodes}`, or start it with `srun --nodes={num_nodes} "
        f"--ntasks-per-node={num_devices}`."
    )
