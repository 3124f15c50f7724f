"""From a checkpoint folder to a model graph and its weights program."""
