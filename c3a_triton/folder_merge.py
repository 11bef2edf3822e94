"""`merge_folder` by the path of former versions, by which scripts that merge into folders import it."""

from .commands.folder_merge import merge_folder

__all__ = ["merge_folder"]
