"""The families of models: one file, or one package, each."""
