from dsmq import *  # noqa: F403
