"""The same model run in several ways: how long each takes, how close its outputs are, and where time goes.

| module | what it holds |
| --- | --- |
| `subject` | the model, its inputs and their layouts, its ONNX file |
| `variants` | the ways to run it, one entry each |
| `engines` | runtimes that are not torch |
| `agreement` | how far outputs are from those of the model |
| `layers` | the time of every node of a graph |
| `measure` | all of it, in alternation |
| `comparison` | the result, as tables and JSON |
"""
