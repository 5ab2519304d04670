"""From quantised graphs to kernels: what computes every layer, and how its values lie in memory.

| module | what it holds |
| --- | --- |
| `layouts` | the layout of every quantised value, and the conversions between them |
| `choices` | backend and storage of every layer |
| `measuring` | what the candidates take on this machine |
| `deciding` | which layers are faster in float, conversions included |
"""
