"""The commands of `c3a-triton`: `parsers` says what each takes, `run(args)` in the module of its name does it."""
