# The Java SDK's part of the Makefile.

JAVA_IMAGE := build/java.binpb
JAVA_GENERATED := client/java/src/generated/java/io/lowbit

.PHONY: client-java generate-java checkgenerate-java

ifeq ($(shell command -v javac >/dev/null && command -v mvn),)
client-java:
	$(call missing,JDK or Maven)
else
client-java: $(READY) $(JAVA_IMAGE) ## Check, build and test the Java SDK
	mvn -B -ntp -q -f client/java/pom.xml verify
	@touch client/java/target/.ready

client/java/target/.ready: $(JAVA_IMAGE) client/java/pom.xml $(shell find client/java/src/main client/java/src/generated -name '*.java')
	mvn -B -ntp -q -f client/java/pom.xml process-test-classes -Dmaven.test.skip
	@touch $@
endif

$(JAVA_IMAGE): $(LIGHT) client/java/image.py
	@$(BIN)/python client/java/image.py $(LIGHT) $@

generate-java: $(READY)
	$(BIN)/python client/generate.py java $(JAVA_GENERATED)

checkgenerate-java: $(READY)
	$(BIN)/python client/generate.py java $(JAVA_GENERATED) --check

generate: generate-java
checkgenerate: checkgenerate-java
test: client-java
