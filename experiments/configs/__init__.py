"""The configuration of each experiment and script, in the file of the program's name: its flags, what
its config.json holds, and what makes two runs the same.

    config = Compare()                                        defaults
    config = changed(config, rank=4, subjects=8, methods=("base", "lora"))
    results = compare.run(config)

Each nests the library's own configurations (`CorpusConfig`, `TrainConfig`, `lora.Spec`, ...), which
are the only place where their defaults stand. `python -m experiments.compare --help` lists the same
fields.
"""
