"""Optimizers over trees of parameters that may hold Tables."""

from ._carry_over import carry_over as carry_over
from ._clip import clip_by_global_norm as clip_by_global_norm
from ._fused import step as step
from ._lift import LiftState as LiftState
from ._lift import lift as lift
from ._named import adagrad as adagrad
from ._named import adam as adam
from ._named import sgd as sgd
from ._rowwise import rowwise_adagrad as rowwise_adagrad
from ._rowwise import rowwise_adam as rowwise_adam
