"""transformers' Trainer: checkpoints that hold the adapter alone."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from c3a_triton.adapters.manager import AdapterManager
from c3a_triton.adapters.pretrained import SavePretrained, save_adapters
from c3a_triton.bases.sharded import is_sharded
from c3a_triton.errors import ConfigError

__all__ = ["SaveAdapterCallback"]


class SaveAdapterCallback(TrainerCallback):
    """Keeps the frozen base out of the Trainer's checkpoints, and puts the adapters into them in PEFT's form.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SaveAdapterCallback()])

    A checkpoint resumes as before, from the same base model; `c3a_triton.load_adapter` and PEFT load it too, and
    `from_pretrained` does not take it for a whole model. At the end of training the adapters are also saved to
    `args.output_dir`, which is what `trainer.push_to_hub` uploads; `trainer.save_model(folder)` writes them and nothing
    else. The adapter `"default"` lies in the folder itself, others in folders of their names, as PEFT has it.

    The model must be one that `c3a_triton.apply` adapted: PEFT's models save only their adapters by themselves.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Leave the base out from now on.

        Raises:
            ConfigError: the model is not adapted in place.
        """
        if not isinstance(getattr(model, "c3a", None), AdapterManager):
            raise ConfigError(
                f"SaveAdapterCallback: {type(model).__name__} has no adapters in place; call c3a_triton.apply first. "
                "A PeftModel needs no callback"
            )
        save = model.__dict__.get("save_pretrained")
        if isinstance(save, SavePretrained):
            save.adapter_only = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Add the adapters to the checkpoint."""
        _save(args, model, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Save the adapters to the output folder."""
        _save(args, model, Path(args.output_dir))


def _save(args: TrainingArguments, model: Any, directory: Path) -> None:
    # Where tensors are sharded, every process is needed to put them together.
    if args.should_save or any(map(is_sharded, model.parameters())):
        save_adapters(model, directory)
