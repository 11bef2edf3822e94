"""The commands of `c3a-triton`, one module each: `add(subparsers)` adds the parser and sets what runs."""
