"""Floor 3: communication between the ranks of a group or mesh. Independent of attention."""

from ringattn.comm import gloo_exit as gloo_exit
