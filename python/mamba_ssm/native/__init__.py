"""The native operations: loader, one module of torch glue per operation, and `ops`, which lists them all."""
