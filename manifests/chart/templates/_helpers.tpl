{{- define "lameduck.selector" -}}
app.kubernetes.io/name: lameduck
app.kubernetes.io/component: webhook
{{- end }}

{{- define "lameduck.labels" -}}
{{ include "lameduck.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "lameduck.metadata" -}}
name: lameduck-webhook
namespace: {{ .Release.Namespace }}
labels:
  {{- include "lameduck.labels" . | nindent 2 }}
{{- end }}

{{- define "lameduck.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* What both entries of the webhook's configuration have in common. */ -}}
{{- define "lameduck.entry" -}}
rules:
  - {apiGroups: [""], apiVersions: [v1], resources: [pods], operations: [CREATE], scope: Namespaced}
clientConfig:
  service: {name: lameduck-webhook, namespace: {{ .Release.Namespace }}, path: /mutate, port: 443}
admissionReviewVersions: [v1]
failurePolicy: {{ .Values.failurePolicy }}
matchPolicy: Equivalent
reinvocationPolicy: IfNeeded
sideEffects: NoneOnDryRun
timeoutSeconds: 5
{{- end }}
