import numpy as np
from numpy.typing import NDArray

class Model: ...

class Categorical(Model):
    def __init__(self, probabilities: NDArray[np.float64], perfect: bool = ...) -> None: ...

class Uniform(Model):
    def __init__(self, size: int) -> None: ...
