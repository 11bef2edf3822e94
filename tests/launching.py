"""Programs of several processes, on CPUs. The cases of a file share one launch: importing takes longer than they do."""

import importlib.util
import os
import socket
import subprocess
import sys

# Whether transformers is here, in a release (5.17 or later) whose plans spread models in DTensors.
HAS_PLANS = bool(importlib.util.find_spec("transformers")) and bool(
    importlib.util.find_spec("transformers.distributed.tensor_parallel")
)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(module: str, *arguments: str, deepspeed: bool = False) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Where accelerate is told of CPUs it passes DeepSpeed over.
    variables |= {"DS_ACCELERATOR": "cpu"} if deepspeed else {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


def launch_by_accelerate(*arguments: str, deepspeed: bool = False) -> None:
    """Told of a port that is taken, accelerate has the system choose one as it is opened: no race for it."""
    with socket.create_server(("localhost", 0)) as taken:
        port = ("--main_process_port", str(taken.getsockname()[1]))
        launch("accelerate.commands.launch", *port, *arguments, deepspeed=deepspeed)
