"""Workers: the processes around the engines that compute prompts and make tokens; floor 1 over `bus` and `transport`."""
