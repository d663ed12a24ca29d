def register_config(): pass
def register_model(): pass
