"""vLLM as a prefill or decode engine: `engine.VllmEngine` in the worker, `connector.KvPushConnector` inside vLLM's processes.

    worker process           EngineCore process              vLLM worker process (on a GPU without TP: the EngineCore)
      engine.py                connector.py                    connector.py
      side_channel.py  <---->    scheduler.py (what to move)     worker_side.py (moves it: hand-off endpoint on a thread)

vLLM itself is imported when an engine starts, never before.
"""
