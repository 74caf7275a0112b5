from configs.schema import RunConfig
def preset(name): return RunConfig()
